"""How surprised a checkpoint is by the truth: a finer measure than what it writes, and cheaper.

Runs the layers themselves, without an engine. T tokens of a question with its answer, A of the
answer, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
import torch
from torch import Tensor

from model.config import load_config
from model.decoder import Decoder
from model.engine.config import EngineConfig
from model.engine.ranks import layer_spans
from model.inputs.images import prepare_image
from model.layers.memory import LayerMemory
from model.layers.ragged import BLOCK_TOKENS, RaggedBatch
from model.nano.faults import Fault
from model.nano.pages.page import Page
from model.nano.quality import png
from model.nano.tasks import Answers, answers, prompts
from model.tokenizer import Tokenizer
from model.weights.checkpoint import load_decoder


@dataclass(frozen=True)
class AnswerLoss:
    """Of the tokens of true answers, each given the true ones before it. nats: mean of -log p.
    wrong: the share of which another token was the likeliest."""

    tokens: int
    nats: float
    wrong: float


def answer_loss(
    config: EngineConfig,
    pages: Sequence[Page],
    fault: Fault | None = None,
    tasks: Sequence[str] | None = None,
) -> AnswerLoss:
    """Of everything that can be asked of the pages, or only of `tasks`.

    The layers are loaded as those of `config.ranks` ranks, and computed `config.chunk_tokens`
    tokens at a time. fault: is done to each rank's layers first.
    """
    reader = Reader(config, fault)
    tokenizer = Tokenizer.from_checkpoint(config.checkpoint)
    templates = {task: tokenizer.prompt_template(text) for task, text in prompts().items()}
    # A token for each character, as the model learnt to answer.
    encode = Answers(tokenizers.Tokenizer.from_str(tokenizer.serialize())).encode
    losses_A = []
    for page in pages:
        cut = prepare_image(png(page), reader.model.pinpoints)
        features_PD = reader.see(torch.from_numpy(cut.tiles), (cut.width, cut.height))
        for task, truth in answers(page.content).items():
            if tasks is None or task in tasks:
                question = templates[task].fill(cut.layout.tokens)
                losses_A.append(reader.losses(question, features_PD, encode(truth).token_ids))
    nats_A, wrong_A = (torch.cat(column) for column in zip(*losses_A, strict=True))
    return AnswerLoss(len(nats_A), nats_A.mean().item(), wrong_A.float().mean().item())


class Reader:
    """The layers of all ranks, one after the other in this process, on the ranks' devices."""

    def __init__(self, config: EngineConfig, fault: Fault | None = None) -> None:
        self.model = load_config(config.checkpoint)
        self._dtype, self._chunk = config.torch_dtype, config.chunk_tokens
        self._ranks: list[tuple[Decoder, torch.device]] = []
        for rank, span in enumerate(layer_spans(self.model, config.ranks)):
            device = config.rank_device(rank)
            decoder = load_decoder(
                config.checkpoint, span, dtype=config.torch_dtype, device=device,
                quantization=config.quantization,
            )  # fmt: skip
            if fault:
                fault(decoder)
            self._ranks.append((decoder, device))

    def see(self, tiles: Tensor, size: tuple[int, int]) -> Tensor:
        return self._ranks[0][0].image_features(tiles, size)

    def losses(
        self, question: np.ndarray, features_PD: Tensor, answer: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """On the CPU, for each token of the answer: nats [A], and whether another was likelier."""
        first, device = self._ranks[0]
        ids_T = torch.from_numpy(np.concatenate([question, answer])).long()
        place = int(np.flatnonzero(question == self.model.image_token_id)[0])
        hidden_TD = first.embed(ids_T.to(device), [(place, features_PD)])
        for decoder, device in self._ranks:
            hidden_TD = self._layers(decoder, device, hidden_TD.to(device))
        logits_AV = self._ranks[-1][0].logits(hidden_TD[len(question) - 1 : -1]).cpu()
        answer_A = ids_T[len(question) :]
        nats_A = torch.nn.functional.cross_entropy(logits_AV, answer_A, reduction="none")
        return nats_A, logits_AV.argmax(-1) != answer_A

    def _layers(self, decoder: Decoder, device: torch.device, hidden_TD: Tensor) -> Tensor:
        tokens = len(hidden_TD)
        blocks = range(-(-tokens // BLOCK_TOKENS))
        memory = LayerMemory(
            self.model.text, decoder.span, slots=1, blocks=len(blocks), dtype=self._dtype,
            device=device,
        )  # fmt: skip
        # Chunks begin at whole blocks, as the scheduler cuts them.
        step = self._chunk // BLOCK_TOKENS * BLOCK_TOKENS
        done = []
        for start in range(0, tokens, step):
            chunk_TD = hidden_TD[start : start + step]
            batch = RaggedBatch.build([len(chunk_TD)], [start], [0], [blocks], device)
            done.append(decoder(chunk_TD, batch, memory))
        return torch.cat(done)
