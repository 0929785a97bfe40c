"""The demo's own images; the demo as a whole is `make demo`."""

import tarfile

import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import demo


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "IMAGES", tmp_path / "images")
    demo.write_source()
    return tmp_path / "images"


def test_the_demo_promises_37_good_images_and_3_damaged_ones(source):
    damaged = {"cut-in-the-middle.jpg", "not-an-image.jpg", "empty.png"}
    files = {path.name for path in source.iterdir()}
    photographs = files - damaged - {"letters.tar", "invoices.parquet"}
    assert damaged < files
    with tarfile.open(source / "letters.tar") as tar:
        pages = len(tar.getnames()) + pq.read_metadata(source / "invoices.parquet").num_rows
    assert len(photographs) + pages == 37
    for name in photographs:
        Image.open(source / name).load()


def test_the_damaged_files_are_damaged(source):
    for name in ("cut-in-the-middle.jpg", "not-an-image.jpg", "empty.png"):
        with pytest.raises(OSError, match=r"truncated|cannot identify"):
            Image.open(source / name).load()
