"""Random checkpoints must have the released layout, and be written without holding them."""

import json

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from model.config import load_config
from model.nano.random_checkpoint import released_pinpoints
from model.weights.index import INDEX
from model.weights.names import checkpoint_tensors
from tests.model.conftest import write_tiny


def test_shards_hold_what_the_index_says_with_experts_spread_over_them(checkpoint):
    index = json.loads((checkpoint / INDEX).read_text())
    held = {}
    for shard in checkpoint.glob("*.safetensors"):
        held |= {name: (shard.name, tensor) for name, tensor in load_file(shard).items()}
    assert {name: shard for name, (shard, _) in held.items()} == index["weight_map"]
    for entry in checkpoint_tensors(load_config(checkpoint)):
        tensor = held[entry.name][1]
        assert tensor.shape == entry.shape
        assert tensor.dtype == torch.bfloat16
        assert tensor.isfinite().all()
    names = [name for name in held if "layers.0." in name and "experts.2." in name]
    assert len({held[name][0] for name in names}) == 3
    total = sum(tensor.nbytes for _, tensor in held.values())
    assert index["metadata"]["total_size"] == total


def test_weights_depend_on_the_seed_and_not_on_the_shards_or_threads(tmp_path):
    def head(folder, **kwargs):
        path = write_tiny(tmp_path / folder, dtype="float32", **kwargs)
        shard = json.loads((path / INDEX).read_text())["weight_map"][
            "language_model.lm_head.weight"
        ]
        return load_file(path / shard)["language_model.lm_head.weight"]

    two, seven = head("two", shards=2), head("seven", shards=7, threads=3)
    assert torch.equal(two, seven)
    assert not torch.equal(two, head("other", shards=2, seed=1))


def test_tensors_drawn_in_pieces_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("model.nano.random_checkpoint._CHUNK_ELEMENTS", 1000)
    path = write_tiny(tmp_path, shards=1)
    tensors = load_file(path / "model-00001-of-00001.safetensors")
    assert abs(tensors["language_model.model.embed_tokens.weight"].float().std() - 1) < 0.02


def test_the_pinpoints_are_the_28_released_ones():
    pinpoints = released_pinpoints()
    sides = (336, 672, 1008, 1344, 1680, 2016)
    expected = {(a, b) for a in sides for b in sides if min(a, b) <= 1008} | {(1344, 1344)}
    assert set(pinpoints) == expected
    assert len(pinpoints) == 28


def test_the_chat_template_renders_the_released_prompt(checkpoint):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<beginning_of_sentence>system ai_setting=assistant\nBe brief.<end_of_sentence>\n"
        "<beginning_of_sentence>user name=user\n<image>What is it?<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n"
    )
    config = load_config(checkpoint)
    ids = tokenizer(text)["input_ids"]
    assert ids.count(config.image_token_id) == 1
    assert ids.count(config.eos_token_ids[0]) == 2
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) <= config.text.vocab_size


def test_any_text_survives_the_tokenizer(checkpoint):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    text = "A boat, naïve 日本語 🚀\n\tand  two spaces"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
