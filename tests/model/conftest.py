"""Checkpoints small enough to load in a blink, shared by the tests of this folder."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model.nano.random_checkpoint import write_random_checkpoint


def write_tiny(path: Path, **settings: Any) -> Path:
    """8 layers, hidden size 64, tiles of 56 px, bf16, three shards."""
    tiny: dict[str, Any] = {
        "hidden_size": 64,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "experts": 4,
        "intermediate_size": 96,
        "vocab_size": 640,
        "vision_hidden_size": 32,
        "vision_intermediate_size": 64,
        "tile": 56,
        "shards": 3,
    }
    return write_random_checkpoint(path, **(tiny | settings))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # The tests' products are tiny: more threads only wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))
