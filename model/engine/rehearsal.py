"""How much GPU memory is left for sequences: run the largest microbatch once and look.

Shapes: T tokens, D hidden size, N sequences.
"""

import logging
from collections.abc import Callable

import numpy as np
import torch

from model.decoder import Decoder
from model.engine.config import EngineConfig
from model.engine.mask_memory import MaskMemory
from model.engine.sampling import Draw, Masks, choose
from model.engine.sequence import blocks_for
from model.layers.memory import LayerMemory
from model.layers.ragged import RaggedBatch

logger = logging.getLogger(__name__)

# For what a rehearsal does not see: fragmentation, and hidden states on their way to the rank after
# (of 16,384 tokens, 192 MiB each, three at most). NCCL has what it takes by then.
MARGIN_BYTES = 2**30


@torch.inference_mode()
def measure_room(decoder: Decoder, device: torch.device, config: EngineConfig) -> int:
    """Bytes free on the GPU for slots and blocks while the largest microbatch is computed."""
    needed = _most_bytes(_rehearse, decoder, device, config)
    # What decode steps compute in stays with their graphs, which share it among themselves.
    needed += _most_bytes(_rehearse_decode, decoder, device, config)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    logger.info(
        "%s: %.1f GiB free, %.1f GiB kept for a microbatch of %d tokens",
        device,
        free / 2**30,
        (needed + MARGIN_BYTES) / 2**30,
        config.chunk_tokens,
    )
    return max(0, free - needed - MARGIN_BYTES)


def _most_bytes(
    rehearse: Callable[[Decoder, torch.device, EngineConfig], None],
    decoder: Decoder,
    device: torch.device,
    config: EngineConfig,
) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    rehearse(decoder, device, config)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _rehearse_decode(decoder: Decoder, device: torch.device, config: EngineConfig) -> None:
    """The layers with as many single tokens as there may be, all in one slot and one block: what
    they write there means nothing."""
    text, dtype = decoder.config.text, config.torch_dtype
    memory = LayerMemory(text, decoder.span, slots=1, blocks=1, dtype=dtype, device=device)
    count = min(config.chunk_tokens, config.most_sequences)
    batch = RaggedBatch.build([1] * count, [0] * count, [0] * count, [[0]] * count, device)
    hidden_TD = torch.randn(count, text.hidden_size, dtype=dtype, device=device)
    decoder(hidden_TD, batch, memory)


def _rehearse(decoder: Decoder, device: torch.device, config: EngineConfig) -> None:
    text, vision = decoder.config.text, decoder.config.vision
    tokens, dtype = config.chunk_tokens, config.torch_dtype
    if decoder.is_first:
        columns, rows = max(decoder.config.pinpoints, key=lambda side: side[0] * side[1])
        tile = vision.image_size
        tiles = 1 + columns // tile * (rows // tile)
        tiles_NHWC = torch.zeros(tiles, tile, tile, 3, dtype=torch.uint8, device=device)
        decoder.image_features(tiles_NHWC, (columns, rows))
    blocks = list(range(blocks_for(tokens)))
    memory = LayerMemory(
        text, decoder.span, slots=1, blocks=len(blocks), dtype=dtype, device=device
    )
    batch = RaggedBatch.build([tokens], [0], [0], [blocks], device)
    # Like an embedding, and unlike zeros, spread over the experts.
    hidden_TD = torch.randn(tokens, text.hidden_size, dtype=dtype, device=device)
    hidden_TD = decoder(hidden_TD, batch, memory)
    if decoder.is_last:
        sequences = min(tokens, config.most_sequences)
        draws = [Draw(temperature=1.0, top_p=0.9, uniform=0.5)] * sequences
        logits_NV = decoder.logits(hidden_TD[:sequences])
        words = -(-logits_NV.shape[1] // 32)
        masks = Masks(0, tuple(range(sequences)), np.full((sequences, words), -1, dtype=np.int32))
        choose(logits_NV, draws, MaskMemory(device).upload(masks))
