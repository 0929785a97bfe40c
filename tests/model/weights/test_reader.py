"""Reads run ahead and side by side, in little memory, and broken storage is waited for or named."""

import itertools
import os
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import files
from model.files import Folder
from model.weights import reader, shards
from model.weights.reader import ShardReader
from model.weights.shards import StoredTensor, stored_tensors
from schemas.errors import CheckpointError, EngineError

PIECE = 4096


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Folder:
    """One shard: tensors of many pieces and of a few bytes, some at odd places."""
    for module in (shards, reader):
        monkeypatch.setattr(module, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(files, "READ_FIRST_WAIT_S", 0.0)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"wide.{i}": torch.randn(40, 513, generator=generator).to(torch.bfloat16) for i in range(3)
    }
    for i, count in enumerate((1, 3, 5, 4096, 4097)):
        tensors[f"odd.{i}"] = torch.randint(-9, 9, (count,), generator=generator, dtype=torch.int8)
        tensors[f"small.{i}"] = torch.randn(count, 3, generator=generator)
    save_file(tensors, tmp_path / "model.safetensors")
    return Folder(str(tmp_path))


def read_all(folder: Folder, tensors: list[StoredTensor], **how) -> dict[str, torch.Tensor]:
    """What the pieces add up to."""
    rows: dict[str, list[torch.Tensor]] = {}
    for piece, data in ShardReader(folder, **how).pieces(tensors):
        assert piece.first_row == sum(len(part) for part in rows.get(piece.tensor.name, []))
        rows.setdefault(piece.tensor.name, []).append(data.clone())
    return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("threads", [1, 8])
def test_pieces_make_the_tensors_that_safetensors_reads(folder, threads):
    expected = load_file(folder.path("model.safetensors"))
    found = read_all(folder, list(stored_tensors(folder).values()), threads=threads)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_small_tensors_that_lie_together_are_read_at_once(folder, monkeypatch):
    tensors = [t for name, t in stored_tensors(folder).items() if name.startswith("small")]
    ranges = []
    read_into = Folder.read_into

    def counted(self, name, offset, target):
        ranges.append((offset, len(target)))
        read_into(self, name, offset, target)

    monkeypatch.setattr(Folder, "read_into", counted)
    read_all(folder, tensors)
    one_by_one = sum(-(-tensor.nbytes // PIECE) for tensor in tensors)
    assert len(ranges) < one_by_one
    assert sum(length for _, length in ranges) == sum(tensor.nbytes for tensor in tensors)


def test_no_more_is_held_than_the_buffers_however_slow_the_reader_is(folder, monkeypatch):
    held, most, lock = set(), 0, threading.Lock()
    read = ShardReader._read

    def counted(self, what, buffer):
        nonlocal most
        with lock:
            held.add(buffer.data_ptr())
            most = max(most, buffer.nbytes)
        read(self, what, buffer)

    monkeypatch.setattr(ShardReader, "_read", counted)
    read_all(folder, list(stored_tensors(folder).values()), threads=3)
    assert len(held) <= 3 + reader._AHEAD
    assert most <= PIECE


def test_reads_run_side_by_side(folder, monkeypatch):
    meeting, calls = threading.Barrier(4, timeout=20), itertools.count()
    tensors = [t for name, t in stored_tensors(folder).items() if name.startswith("wide")]
    preadv = os.preadv

    def together(*arguments):
        if next(calls) < 4:
            meeting.wait()  # fails unless four reads come here at the same time
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", together)
    read_all(folder, tensors, threads=4)
    assert not meeting.broken


@pytest.mark.parametrize("failures", [1, files.READ_TRIES - 1])
def test_a_range_that_failed_is_read_again(folder, monkeypatch, failures):
    tries: dict[tuple, int] = {}
    read_local = Folder._read_local

    def moody(path, offset, target):
        tries[path, offset] = tries.get((path, offset), 0) + 1
        if tries[path, offset] <= failures:
            target[:] = b"x" * len(target)
            raise OSError(5, "Input/output error")
        return read_local(path, offset, target)

    tensors = list(stored_tensors(folder).values())
    monkeypatch.setattr(Folder, "_read_local", staticmethod(moody))
    found = read_all(folder, tensors)
    monkeypatch.undo()
    expected = load_file(folder.path("model.safetensors"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_storage_that_stays_broken_is_named_and_leaves_no_thread(folder, monkeypatch):
    tensors = list(stored_tensors(folder).values())

    def broken(path, offset, target):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Folder, "_read_local", staticmethod(broken))
    with pytest.raises(EngineError, match=r"model\.safetensors could not be read in 6 tries"):
        read_all(folder, tensors)
    assert not [t for t in threading.enumerate() if t.name.startswith("read")]


def test_a_shard_cut_while_it_is_read_is_named_with_its_size(folder):
    tensors = list(stored_tensors(folder).values())
    end = max(tensor.offset + tensor.nbytes for tensor in tensors)
    os.truncate(folder.path("model.safetensors"), end - 100)
    with pytest.raises(CheckpointError, match=rf"ends at {end - 100:,} bytes; expected \d"):
        read_all(folder, tensors)


def test_a_shard_written_to_while_it_is_read_is_named(folder):
    tensors = list(stored_tensors(folder).values())
    pieces = ShardReader(folder).pieces(tensors)
    next(pieces)
    with open(folder.path("model.safetensors"), "r+b") as file:
        file.seek(tensors[0].offset)
        file.write(b"new")
    with pytest.raises(CheckpointError, match=r"model\.safetensors was written to while"):
        list(pieces)
