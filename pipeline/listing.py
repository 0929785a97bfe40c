"""Listings of any storage in one order: names, sizes, and a stamp that changes with the file.

Opens nothing. Reading and writing is for storage.py.
"""

import os
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from fsspec import AbstractFileSystem

from model.files import is_local


class SourceFile(NamedTuple):
    """What a listing tells of a file, without opening it.

    name: relative to what was listed. size: in bytes. stamp: changes when the file does: its ETag
    where the storage has one, else the time it was last written. modified: that time, in seconds
    since 1970, where a file is there before it is whole; None on stores of whole objects.
    """

    name: str
    size: int | None = None
    stamp: str | None = None
    modified: float | None = None


def list_files(
    fs: AbstractFileSystem, root: str, enter: Callable[[str], bool] = lambda _: True
) -> Iterator[SourceFile]:
    """Every file under `root`, relative to it, in the byte order of whole names, as S3 lists.

    enter: whether to look into a folder; one that is not entered is yielded as `name/`. S3, which
    has no folders, ignores it. Holds the files of one folder (of one page on S3). Raises OSError.
    """
    if is_s3(fs):
        return _list_s3(fs, root, "")
    entries = _local_entries if is_local(fs) else _entries
    return _walk(lambda folder: entries(fs, f"{root}/{folder}".rstrip("/") or "/"), "", enter)


def list_flat(fs: AbstractFileSystem, root: str, prefix: str = "") -> Iterator[str]:
    """The names of the files right in `root` that begin with `prefix`, in any order; none if there
    is no such folder. Raises OSError."""
    if is_s3(fs):
        yield from (file.name for file in _list_s3(fs, root, prefix) if "/" not in file.name)
        return
    names = _local_names(root) if is_local(fs) else (file.name for file in _entries(fs, root))
    try:
        for name in names:
            if not name.endswith("/") and name.startswith(prefix):
                yield name
    except FileNotFoundError:
        return


def stat_file(fs: AbstractFileSystem, path: str) -> SourceFile:
    """What a listing would tell of one file; its name is the last step of the path."""
    if is_local(fs):
        return _local_file(path.rpartition("/")[2], os.stat(path))
    return _described(fs.info(path))


def _walk(
    entries: Callable[[str], Iterator[SourceFile]], folder: str, enter: Callable[[str], bool]
) -> Iterator[SourceFile]:
    for file in sorted(entries(folder), key=lambda file: file.name):
        name = folder + file.name
        if name.endswith("/") and enter(name[:-1]):
            yield from _walk(entries, name, enter)
        else:
            yield file._replace(name=name)


def _local_names(path: str) -> Iterator[str]:
    with os.scandir(path) as entries:
        for entry in entries:
            yield as_text(entry.name) + ("/" if entry.is_dir() else "")


def _local_entries(_fs: AbstractFileSystem, path: str) -> Iterator[SourceFile]:
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir():
                if not (entry.is_symlink() and _is_above(entry.path, path)):
                    yield SourceFile(as_text(entry.name) + "/")
            elif entry.is_file() or entry.is_symlink():
                yield _local_entry(entry)


def _local_entry(entry: os.DirEntry) -> SourceFile:
    name = as_text(entry.name)
    try:
        return _local_file(name, entry.stat())
    except OSError:  # a broken link is a file that is gone
        return SourceFile(name)


def _local_file(name: str, stat: os.stat_result) -> SourceFile:
    return SourceFile(name, stat.st_size, f"{stat.st_mtime_ns:x}", stat.st_mtime)


def as_text(name: str) -> str:
    """A name that Arrow can hold. One that is not UTF-8 changes, so its file will not be found."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _is_above(link: str, path: str) -> bool:
    """Whether a link in the folder `path` leads back to a folder on the way to itself, of which
    some may be links too: following it would not end."""
    target = os.path.realpath(link)
    way = path, *map(str, PurePosixPath(path).parents)
    return any(os.path.commonpath([target, os.path.realpath(step)]) == target for step in way)


def _entries(fs: AbstractFileSystem, path: str) -> Iterator[SourceFile]:
    for info in fs.ls(path, detail=True):
        file = _described(info)
        folder = info["type"] == "directory"
        yield SourceFile(file.name + "/") if folder else file


# What fsspec's file systems call an ETag, and the time a file was last written.
_ETAGS = ("ETag", "etag", "e_tag")
_TIMES = ("mtime", "last_modified", "LastModified", "updated", "modified", "created")


def _described(info: dict[str, Any]) -> SourceFile:
    """What fsspec's description of a file tells."""
    name, size = info["name"].rstrip("/").rpartition("/")[2], info.get("size")
    if etag := next((info[key] for key in _ETAGS if info.get(key)), None):
        return SourceFile(name, size, str(etag).strip('"'))
    written = next((info[key] for key in _TIMES if info.get(key) is not None), None)
    if isinstance(written, datetime):
        written = written.timestamp()
    if isinstance(written, (int, float)):
        return SourceFile(name, size, f"{written:.6f}", float(written))
    return SourceFile(name, size, None if written is None else str(written))


def is_s3(fs: AbstractFileSystem) -> bool:
    """Whether it is a store without folders, whose names are listed flat."""
    return "s3" in fs.protocol


def _list_s3(fs: Any, root: str, prefix: str) -> Iterator[SourceFile]:
    """Pages of the flat listing: s3fs's own listing holds a dict for each of a million objects."""
    bucket, key, _ = fs.split_path(root)
    folder = f"{key}/" if key else ""
    request = {"Bucket": bucket, "Prefix": folder + prefix}
    while True:
        page = fs.call_s3("list_objects_v2", **request)
        for item in page.get("Contents", []):
            if not item["Key"].endswith("/"):  # a marker of an empty folder
                yield SourceFile(item["Key"][len(folder) :], item["Size"], item["ETag"].strip('"'))
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]
