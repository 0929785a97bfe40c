"""A source as users have them: images in a folder, in a tar and in a Parquet file."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

Images = list[tuple[str, bytes]]


def write_folder(folder: Path, images: Images) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in images:
        (folder / name).write_bytes(data)


def write_tar(path: Path, images: Images) -> None:
    """A WebDataset shard: each image with a text beside it."""
    with tarfile.open(path, "w") as tar:
        for name, data in images:
            _add(tar, name, data)
            _add(tar, Path(name).stem + ".txt", b"a caption that nobody asked for")


def write_parquet(path: Path, images: Images, group_rows: int = 8) -> None:
    """The `{bytes, path}` struct of Hugging Face datasets, and a column worth keeping."""
    table = pa.table(
        {
            "image": [{"bytes": data, "path": name} for name, data in images],
            "url": [f"https://example.org/{name}" for name, _ in images],
        }
    )
    pq.write_table(table, path, row_group_size=group_rows)


def write_source(root: Path, images: Images) -> None:
    """A third of the images each: every third one goes to the folder, the tar, the Parquet file."""
    write_folder(root / "loose", images[0::3])
    write_tar(root / "shard.tar", images[1::3])
    write_parquet(root / "table.parquet", images[2::3])


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
