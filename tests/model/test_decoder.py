"""The whole text model against transformers' MiniMax, and that batches do not matter to it."""

import dataclasses
import itertools
from types import MethodType

import pytest
import torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM
from transformers.models.minimax.modeling_minimax import MiniMaxRotaryEmbedding

from model.decoder import Decoder, check_image_tokens
from model.inputs.tiling import choose_layout
from model.layers.lightning_attention import lightning_slopes
from model.layers.memory import LayerMemory
from model.layers.ragged import RaggedBatch
from model.weights.checkpoint import load_decoder
from tests.model.conftest import write_tiny

LAYERS = range(8)
CPU = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture(scope="module")
def decoder(checkpoint) -> Decoder:
    return load_decoder(checkpoint, LAYERS, **CPU, quantization="none")


@pytest.fixture(scope="module")
def int8_decoder(checkpoint) -> Decoder:
    return load_decoder(checkpoint, LAYERS, **CPU, quantization="int8")


@pytest.fixture(scope="module")
def dynamic_decoder(checkpoint):
    return load_decoder(checkpoint, LAYERS, **CPU, quantization="int8-dynamic")


def memory_for(decoder: Decoder, span: range = LAYERS, dtype=torch.float32) -> LayerMemory:
    return LayerMemory(decoder.config.text, span, slots=4, blocks=16, dtype=dtype, device="cpu")


def draw_ids(tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 500, (tokens,), generator=torch.Generator().manual_seed(seed))


def run(decoder, ids, cuts, memory=None, slot=0, table=range(4)) -> torch.Tensor:
    """Logits of every token of one sequence, computed in the given chunks."""
    memory = memory or memory_for(decoder)
    logits = []
    for start, end in itertools.pairwise(cuts):
        batch = RaggedBatch.build([end - start], [start], [slot], [table])
        hidden = decoder(decoder.embed(ids[start:end]), batch, memory)
        logits.append(decoder.logits(hidden))
    return torch.cat(logits)


def transformers_twin(decoder: Decoder) -> MiniMaxForCausalLM:
    """transformers' MiniMax with our weights, and with the partial rotary it leaves out."""
    text = decoder.config.text
    residuals = {
        f"{name}_{weight}_factor": getattr(residual, weight)
        for name, residual in {
            "linear_attn": text.lightning_residual,
            "full_attn": text.softmax_residual,
            "mlp": text.moe_residual,
        }.items()
        for weight in ("alpha", "beta")
    }
    names = {"lightning": "linear_attention", "softmax": "full_attention"}
    config = MiniMaxConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
        num_key_value_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        num_local_experts=text.num_experts,
        num_experts_per_tok=text.experts_per_token,
        rms_norm_eps=text.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
        layer_types=[names[kind] for kind in text.layer_types],
        **residuals,
    )
    config._attn_implementation = "eager"
    model = MiniMaxForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(_twin_weights(decoder), strict=False)
    buffers = {name for name, _ in model.named_buffers()}  # its decays, computed from the config
    assert not unexpected
    assert set(missing) <= buffers
    model.model.rotary_emb.forward = MethodType(_partial_rotary(text), model.model.rotary_emb)
    return model


def _partial_rotary(text):
    """Angles for the first rotary_dim dimensions of a head, none for the rest.

    transformers rotates pairs (i, i + head_dim / 2), the released model (i, i + rotary_dim / 2)
    within the first rotary_dim: `_twin_weights` puts the rows of q and k in that order.
    """

    def forward(self: MiniMaxRotaryEmbedding, x, position_ids):
        half, rotary_half = text.head_dim // 2, text.rotary_dim // 2
        steps = torch.arange(rotary_half, dtype=torch.float32)
        frequencies = torch.zeros(half)
        frequencies[:rotary_half] = text.rope_theta ** (-2 * steps / text.rotary_dim)
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    return forward


def _twin_weights(decoder: Decoder) -> dict[str, torch.Tensor]:
    text, weights = decoder.config.text, {}
    rotary_half, dim = text.rotary_dim // 2, text.head_dim
    rest = list(range(text.rotary_dim, dim))
    # first halves of the pairs, then second halves; what does not turn fills both up
    order = [*range(rotary_half), *rest[: len(rest) // 2]]
    order += [*range(rotary_half, text.rotary_dim), *rest[len(rest) // 2 :]]
    widths = [text.num_heads * dim, text.num_kv_heads * dim, text.num_kv_heads * dim]
    for name, value in decoder.named_parameters():
        if name.startswith(("vision_tower", "projector", "image_newline")):
            continue
        theirs = name.replace("attention.", "self_attn.", 1) if ".attention." in name else name
        theirs = theirs.replace("moe.w13", "mlp.experts.gate_up_proj")
        theirs = theirs.replace("moe.w2", "mlp.experts.down_proj").replace("moe.gate", "mlp.gate")
        theirs = theirs if name == "lm_head.weight" else f"model.{theirs}"
        layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
        if text.layer_types[layer] == "softmax" and ".attention." in name:
            if "out_proj" in name:
                weights[theirs.replace("out_proj", "o_proj")] = value
                continue
            for part, rows in zip("qkv", value.split(widths), strict=True):
                if part != "v":
                    rows = rows.view(-1, dim, rows.shape[1])[:, order].flatten(0, 1)
                weights[theirs.replace("qkv_proj", f"{part}_proj")] = rows
            continue
        weights[theirs] = value
    return weights


@torch.inference_mode()
def test_logits_are_those_of_transformers(decoder):
    ids = draw_ids(300, seed=0)  # more than one of its blocks of 256, and several of ours
    theirs = transformers_twin(decoder)(ids[None], use_cache=False).logits[0]
    ours = run(decoder, ids, [0, 300], table=range(5))
    keep = [i for i in range(ours.shape[1]) if i != decoder.config.image_token_id]
    error = (ours[:, keep] - theirs[:, keep]).norm() / theirs[:, keep].norm()
    assert error < 1e-5
    assert torch.equal(ours[:, keep].argmax(-1), theirs[:, keep].argmax(-1))


@pytest.mark.parametrize("cuts", [[0, 64, 200], [0, 128, 192, 200]])
@pytest.mark.parametrize("quantization", ["none", "int8", "int8-dynamic"])
def test_chunks_change_no_bit(decoder, int8_decoder, dynamic_decoder, cuts, quantization):
    model = {"none": decoder, "int8": int8_decoder, "int8-dynamic": dynamic_decoder}[quantization]
    ids = draw_ids(200, seed=1)
    assert torch.equal(run(model, ids, cuts), run(model, ids, [0, 200]))


def test_decode_agrees_with_the_prompt_form(decoder):
    ids = draw_ids(140, seed=2)
    stepped = run(decoder, ids, [0, 64, *range(65, 141)])
    torch.testing.assert_close(stepped, run(decoder, ids, [0, 140]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_sequence_does_not_change_with_its_batch(int8_decoder, threads):
    """Three sequences, prompts and decode mixed, in other slots and blocks than alone."""
    ids = [draw_ids(n, seed=3 + n) for n in (130, 65, 70)]
    alone = [run(int8_decoder, x, [0, len(x) - 2, len(x) - 1, len(x)]) for x in ids[1:]]
    alone.insert(0, run(int8_decoder, ids[0], [0, 130]))
    memory, tables = memory_for(int8_decoder), [[8, 3, 1], [0, 5], [9, 2]]
    seen: list[list[torch.Tensor]] = [[], [], []]
    # (start, end) of each sequence that takes part in a step
    steps = [{1: (0, 63)}, {0: (0, 64), 1: (63, 64), 2: (0, 68)}]
    steps += [{2: (68, 69), 0: (64, 130), 1: (64, 65)}, {2: (69, 70)}]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step in steps:
            batch = RaggedBatch.build(
                [end - start for start, end in step.values()],
                [start for start, _ in step.values()],
                [3 - i for i in step],
                [tables[i] for i in step],
            )
            joined = torch.cat([ids[i][start:end] for i, (start, end) in step.items()])
            hidden = int8_decoder(int8_decoder.embed(joined), batch, memory)
            parts = int8_decoder.logits(hidden).split(batch.lengths)
            for i, part in zip(step, parts, strict=True):
                seen[i].append(part)
    finally:
        torch.set_num_threads(before)
    for i in range(3):
        assert torch.equal(torch.cat(seen[i]), alone[i]), f"sequence {i}"


def test_ranks_in_a_row_compute_what_one_rank_does(checkpoint, int8_decoder):
    ids = draw_ids(100, seed=7)
    batch = RaggedBatch.build([100], [0], [1], [range(2)])
    hidden, parts = int8_decoder.embed(ids), []
    for span in (range(0, 3), range(3, 8)):
        parts.append(load_decoder(checkpoint, span, **CPU))
        hidden = parts[-1](hidden, batch, memory_for(parts[-1], span))
    assert torch.equal(parts[-1].logits(hidden), run(int8_decoder, ids, [0, 100]))


def test_bf16_stays_near_fp32(tmp_path, monkeypatch):
    # With the usual gains a random network is chaotic: rounding grows from layer to layer.
    monkeypatch.setattr("model.nano.random_checkpoint._GAINS", {})
    path = write_tiny(tmp_path)
    ids = draw_ids(100, seed=8)
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        decoder = load_decoder(path, LAYERS, dtype=dtype, device="cpu", quantization="none")
        logits.append(run(decoder, ids, [0, 64, 100], memory_for(decoder, dtype=dtype)))
    finite = logits[0].isfinite()
    exact, rounded = (x[finite] for x in logits)
    assert logits[1].dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 0.06


def test_an_image_takes_as_many_tokens_as_its_layout_says(decoder):
    generator = torch.Generator().manual_seed(9)
    for size in [(100, 80), (56, 300), (3, 500)]:
        layout = choose_layout(*size, decoder.config.pinpoints, 56, 14)
        tiles = torch.randint(0, 256, (layout.tiles, 56, 56, 3), generator=generator)
        features = decoder.image_features(tiles.to(torch.uint8), size)
        assert features.shape == (layout.tokens, 64)
        assert features.isfinite().all()


def test_features_take_the_place_of_image_tokens_and_of_no_other(decoder):
    image = decoder.config.image_token_id
    ids = torch.tensor([1, image, image, 2, image, 3])
    features = torch.randn(3, 64)
    hidden = decoder.embed(ids, [(1, features[:2]), (4, features[2:])])
    assert torch.equal(hidden[[1, 2, 4]], features)
    assert torch.equal(hidden[[0, 3, 5]], decoder.embed(torch.tensor([1, 2, 3])))


@pytest.mark.parametrize("given", [[], [(1, 1)], [(1, 3)], [(0, 2), (4, 1)]])
def test_features_that_do_not_match_the_image_tokens_are_refused(decoder, given):
    image = decoder.config.image_token_id
    ids = torch.tensor([1, image, image, 2, image, 3])
    runs = [(start, torch.zeros(count, 64)) for start, count in given]
    count = sum(count for _, count in given)
    with pytest.raises(ValueError, match=f"3 image tokens, {count} image features"):
        check_image_tokens(ids.numpy(), runs, image)


def test_the_model_never_writes_an_image_token(decoder):
    assert (run(decoder, draw_ids(5, 10), [0, 5])[:, decoder.config.image_token_id] < -1e30).all()


def test_slopes_of_a_single_layer_are_finite(decoder):
    text = dataclasses.replace(decoder.config.text, num_layers=1, layer_types=("lightning",))
    assert lightning_slopes(0, text).isfinite().all()
