"""An int8 checkpoint must be its source in int8, bit for bit, however often its making stopped."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from model.engine.config import EngineConfig
from model.engine.engine import Engine
from model.files import UNFINISHED, Folder
from model.weights import convert
from model.weights.checkpoint import check_checkpoint, load_decoder
from model.weights.convert import Quantizer
from model.weights.index import INDEX
from model.weights.revision import checkpoint_revision
from schemas.errors import CheckpointError, ConfigError, StoppedError
from tests.model.conftest import write_tiny
from tests.model.engine.conftest import text_request

CPU = {"dtype": torch.float32, "device": "cpu"}


def quantizer(source: Path, target: Path | str) -> Quantizer:
    return Quantizer(Folder(str(source)), Folder(str(target)))


@pytest.fixture(scope="module")
def int8(checkpoint, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("int8") / "made"
    quantizer(checkpoint, target).run(2)
    return target


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_an_int8_checkpoint_loads_bit_equal_to_its_source_in_int8(checkpoint, int8):
    for span in (range(8), range(3), range(3, 8)):
        expected = dict(load_decoder(checkpoint, span, **CPU).named_parameters())
        for name, parameter in load_decoder(int8, span, **CPU).named_parameters():
            assert torch.equal(parameter, expected[name]), name
    with pytest.raises(CheckpointError, match="--quantization int8"):
        check_checkpoint(int8, quantization="none")


def test_it_writes_the_same_texts(checkpoint, int8):
    texts = []
    for folder in (checkpoint, int8):
        engine = Engine(EngineConfig(str(folder), device="cpu", quantization="int8"))
        engine.add(text_request("a", 70, max_new_tokens=20))
        results = []
        while not results:
            results = engine.step()
        texts.append(results[0].token_ids)
        engine.close()
    assert texts[0] == texts[1]


def test_it_counts_as_the_same_model_and_another_source_as_another(checkpoint, int8, tmp_path):
    assert checkpoint_revision(int8) == checkpoint_revision(checkpoint)
    other = write_tiny(tmp_path / "other", seed=1)
    quantizer(other, tmp_path / "int8").run(2)
    assert checkpoint_revision(tmp_path / "int8") == checkpoint_revision(other)
    assert checkpoint_revision(other) != checkpoint_revision(checkpoint)
    (tmp_path / "int8/tokenizer_config.json").write_text("{}")
    assert checkpoint_revision(tmp_path / "int8") != checkpoint_revision(other)


def test_its_files_are_what_other_readers_expect(checkpoint, int8):
    index = json.loads((int8 / INDEX).read_text())
    held, total = {}, 0
    for path in int8.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            held |= dict.fromkeys(shard.keys(), path.name)
            total += sum(shard.get_tensor(name).nbytes for name in shard.keys())  # noqa: SIM118
    assert held == index["weight_map"]
    assert index["metadata"]["total_size"] == total
    name = "language_model.model.layers.1.block_sparse_moe.experts.2.w1.weight"
    with safe_open(int8 / held[f"{name}._data"], "pt") as shard:
        assert shard.get_tensor(f"{name}._data").dtype == torch.int8
        assert shard.get_tensor(f"{name}._scale").dtype == torch.bfloat16
        assert shard.get_tensor(f"{name}._scale").shape == (96, 1)
    config = json.loads((int8 / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "quanto"
    for file in ("tokenizer.json", "preprocessor_config.json"):
        assert (int8 / file).read_bytes() == (checkpoint / file).read_bytes()


def test_no_shard_holds_two_layers_or_more_than_it_may(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "MOST_SHARD_BYTES", 50_000)
    quantizer(checkpoint, tmp_path).run(1)
    layers = {}
    for tensor, shard in json.loads((tmp_path / INDEX).read_text())["weight_map"].items():
        found = re.search(r"language_model\.model\.layers\.(\d+)", tensor)
        layers.setdefault(shard, set()).add(found and found[1])
    assert all(len(of_shard) == 1 for of_shard in layers.values())
    assert any(shard.startswith("layer-7-2-of-") for shard in layers)
    largest = 8 * 640 * 64  # the embedding, which is not cut
    assert all(len(data) < 50_000 + largest for data in shards(tmp_path).values())
    check_checkpoint(tmp_path)


def test_a_stopped_quantize_goes_on_and_redoes_no_whole_shard(checkpoint, int8, tmp_path):
    class Killed(BaseException):
        pass

    def killed_after(limit: int):
        read = 0

        def count(size: int) -> None:
            nonlocal read
            read += size
            if read > limit:
                raise Killed

        return count

    stops, kept = 0, {}
    while True:
        work = quantizer(checkpoint, tmp_path)
        try:
            done = work.run(2, killed_after(300_000))
            break
        except Killed:
            stops += 1
        assert not (tmp_path / INDEX).exists()
        assert all((tmp_path / name).stat().st_mtime_ns == at for name, at in kept.items())
        whole = [path.stem for path in (tmp_path / "_quantize").glob("*.safetensors.json")]
        kept = {name: (tmp_path / name).stat().st_mtime_ns for name in whole}
    assert stops >= 3
    assert done.shards_kept == len(kept) > 0
    assert shards(tmp_path) == shards(int8)
    assert json.loads((tmp_path / INDEX).read_text()) == json.loads((int8 / INDEX).read_text())
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in int8.iterdir()}
    again = quantizer(checkpoint, tmp_path)
    assert again.is_done
    assert again.run(2).bytes_read == 0


def test_what_a_killed_process_left_unfinished_is_cleared_away(checkpoint, tmp_path):
    source = Folder(str(tmp_path / "_quantize"))
    source.write("source.json", json.dumps({"revision": checkpoint_revision(checkpoint)}).encode())
    (tmp_path / f".layer-1.safetensors.123{UNFINISHED}").write_bytes(b"half")
    (tmp_path / "layer-0.safetensors").write_bytes(b"half, and without a record")
    quantizer(checkpoint, tmp_path).run(2)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "_"))]
    check_checkpoint(tmp_path)


def test_what_cannot_be_done_is_refused_and_nothing_touched(checkpoint, int8, tmp_path):
    with pytest.raises(CheckpointError, match="is quantized already"):
        quantizer(int8, tmp_path / "twice")
    with pytest.raises(ConfigError, match="holds another checkpoint"):
        quantizer(checkpoint, checkpoint)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"cat")
    with pytest.raises(ConfigError, match=r"other files, such as cat\.jpg"):
        quantizer(checkpoint, tmp_path / "photos")
    begun = Folder(str(tmp_path / "begun/_quantize"))
    begun.write("source.json", b'{"revision": "0123456789ab"}')
    with pytest.raises(ConfigError, match="made from revision 0123456789ab"):
        quantizer(checkpoint, tmp_path / "begun")
    assert not (tmp_path / "twice").exists()


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(Folder, "free_bytes", lambda self: 1000)
    with pytest.raises(ConfigError, match=r"needs 0\.0 GB more, and its disk has 0\.0 GB free"):
        quantizer(checkpoint, tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


def test_a_disk_that_fills_up_is_one_line(checkpoint, tmp_path, monkeypatch):
    work = quantizer(checkpoint, tmp_path)

    def full(self, name):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Folder, "writing", full)
    with pytest.raises(StoppedError, match=r"cannot write to .*No space left"):
        work.run(1)


@pytest.mark.parametrize("at", [-1, -30_000])
def test_one_changed_byte_is_named_by_shard_and_tensor(checkpoint, tmp_path, at):
    work = quantizer(checkpoint, tmp_path)
    work.run(2)
    path = tmp_path / "layer-5.safetensors"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    named = r"layer-5\.safetensors is damaged .*SHA-256 of language_model\.model\.layers\.5"
    with pytest.raises(CheckpointError, match=named):
        load_decoder(tmp_path, range(4, 8), **CPU)
    with pytest.raises(CheckpointError, match=named):
        work.read_back()
    load_decoder(tmp_path, range(0, 4), **CPU)  # another rank is not hurt
    path.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"layer-5\.safetensors has .* its header says"):
        load_decoder(tmp_path, range(0, 4), **CPU)


def test_from_any_storage_to_any_other(checkpoint, int8):
    """fsspec's memory stands for what is neither a disk nor S3."""
    source, target = Folder("memory://bf16"), Folder("memory://int8")
    for path in checkpoint.iterdir():
        source.write(path.name, path.read_bytes())
    Quantizer(source, target).run(2)
    assert {name: target.read(name) for name in shards(int8)} == shards(int8)
    assert target.files().keys() == {path.name for path in int8.iterdir()}
    expected = dict(load_decoder(checkpoint, range(8), **CPU).named_parameters())
    for folder in (source, target):
        for name, parameter in load_decoder(folder, range(8), **CPU).named_parameters():
            assert torch.equal(parameter, expected[name]), name
        assert checkpoint_revision(folder) == checkpoint_revision(checkpoint)
