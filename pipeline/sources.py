"""What SOURCE means: the images, documents, tars, Parquet files or lists behind an address, in one
order.

Lists files only. What is inside of one is for plan.py and read.py.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from fsspec import AbstractFileSystem
from fsspec.utils import glob_translate

from pipeline.listing import SourceFile, list_files, stat_file
from pipeline.storage import full_address, open_fs, storage_error
from schemas.errors import ConfigError
from schemas.ledger import UnitKind

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "avif", "jp2")
_KINDS = dict.fromkeys(_IMAGE_SUFFIXES, UnitKind.IMAGES) | {
    # A TIFF holds one image, or many pages: only its content tells.
    **dict.fromkeys(("tif", "tiff", "pdf"), UnitKind.DOCUMENTS),
    "tar": UnitKind.TAR,
    "parquet": UnitKind.PARQUET,
}
READABLE = ", ".join("." + suffix for suffix in _KINDS)
# Read only where SOURCE names them: beside images, a .txt holds a caption, a .csv the labels.
_LISTS: dict[str, UnitKind] = dict.fromkeys(("txt", "csv", "jsonl"), UnitKind.LIST)
_LISTS_TOO = f"; lists of addresses ({', '.join('.' + suffix for suffix in _LISTS)}) are read"
_LONGEST_ENDING = 8  # a file named after its date has none that says what it is
_MAGIC = re.compile(r"[*?\[]")
_HIDDEN = re.compile(r"(^|/)\.(?!\.?(/|$))")  # but `tar -cf shard.tar .` names its files ./a.jpg
_UNREADABLE = (
    ". Its files would be left out without a word: let it be read, or give a SOURCE without it"
)
_OUR_PART = re.compile(r"part-\d{9}\.parquet")


def kind_of(name: str) -> UnitKind | None:
    """What a file is by its name, whatever the case; None for what is not read."""
    return _KINDS.get(_suffix(name)) or _LISTS.get(_suffix(name))


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""


def ending(name: str) -> str:
    """By what a file that is not read is counted: `.heic`, or one word for all that are odd."""
    suffix = _suffix(name)
    return f".{suffix}" if suffix.isalnum() and len(suffix) <= _LONGEST_ENDING else "others"


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder above it, starts with a dot: `.cache/`, macOS's `._a.jpg`."""
    return _HIDDEN.search(name) is not None


@dataclass(frozen=True)
class Source:
    """An address that was opened. Small and picklable: readers get it as it is.

    root: the folder that names are relative to. only: the name, when SOURCE is a single file.
    pattern: the glob, relative to the root, that names must match.
    """

    address: str
    fs: AbstractFileSystem
    root: str
    only: str | None = None
    pattern: str | None = None

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def full_address(self, name: str) -> str:
        """What goes into the `source` column."""
        return full_address(self.fs, self.path(name))

    def files(self, unread: Counter[str] | None = None) -> Iterator[SourceFile]:
        """Everything to read, in the byte order of the names. Raises ConfigError.

        unread: counts, by `ending`, what lies there and is not read for its name.

        Lists of addresses are among it only where SOURCE is one, or a glob that ends like one.
        Hidden files are left out, and so are the parts of datasets that `vl01` wrote: an output
        inside of its source must not be read as another source.
        """
        pattern = re.compile(glob_translate(self.pattern)) if self.pattern else None
        try:
            if self.only:
                yield stat_file(self.fs, self.path(self.only))._replace(name=self.only)
                return
            for file in self._listed():
                if file.name.endswith("/") or (pattern and not pattern.match(file.name)):
                    continue
                if self._is_read(file.name):
                    yield file
                elif unread is not None:
                    unread[ending(file.name)] += 1
        except Exception as error:  # storage clients raise far more than OSError
            advice = _UNREADABLE if isinstance(error, PermissionError) else ""
            raise ConfigError(
                f"cannot list {self.address}: {storage_error(error)}{advice}"
            ) from error

    def _is_read(self, name: str) -> bool:
        kind = kind_of(name)
        names_lists = kind_of(self.pattern or "") is UnitKind.LIST
        return kind is not None and (names_lists or kind is not UnitKind.LIST)

    def _listed(self) -> Iterator[SourceFile]:
        ours = set()
        for file in list_files(self.fs, self.root, self._enter):
            name = file.name
            folder, _, base = name.rpartition("/")
            if "_vl01/" in name:
                ours.add(name[: name.index("_vl01/")].rstrip("/"))
            elif not is_hidden(name) and not (folder in ours and _OUR_PART.fullmatch(base)):
                yield file

    def _enter(self, folder: str) -> bool:
        if is_hidden(folder) or folder.rpartition("/")[2] == "_vl01":
            return False
        if self.pattern is None or "**" in self.pattern:
            return True
        depth, steps = folder.count("/") + 1, self.pattern.split("/")
        begin = glob_translate("/".join(steps[:depth]))
        return depth < len(steps) and re.match(begin, folder) is not None


def open_source(address: str, endpoint_url: str | None = None) -> Source:
    """A folder, a glob, or one file, at any fsspec address.

    Raises ConfigError when it is not there, cannot be read, or holds nothing that is read here;
    looks no further than the first file that is.
    """
    fs, path = open_fs(address, endpoint_url)
    source = _find(address, fs, path)
    if next(source.files(), None) is None:
        raise ConfigError(
            f"nothing to read in {address}; expected files ending in {READABLE}{_LISTS_TOO} when"
            " SOURCE is their name or a glob such as lists/*.txt"
        )
    return source


def _find(address: str, fs: AbstractFileSystem, path: str) -> Source:
    try:
        if fs.isdir(path):
            return Source(address, fs, path)
        if fs.isfile(path):
            folder, _, name = path.rpartition("/")
            if kind_of(name) is None:
                raise ConfigError(
                    f"cannot read {address}; expected a file ending in {READABLE}{_LISTS_TOO} too"
                )
            return Source(address, fs, folder, only=name)
        # Only now: brackets and question marks are allowed in the name of a file.
        if magic := _MAGIC.search(path):
            root, _, _ = path[: magic.start()].rpartition("/")
            if fs.isdir(root or "/"):
                return Source(address, fs, root, pattern=path[len(root) + 1 :])
    except ConfigError:
        raise
    except Exception as error:  # storage clients raise far more than OSError
        raise ConfigError(f"cannot read {address}: {storage_error(error)}") from error
    raise ConfigError(
        f"{address} does not exist; expected a folder, a glob, or a file ending in {READABLE}"
        f"{_LISTS_TOO} too"
    )
