"""A row for each document: its pages joined again, from the committed parts.

    OUT/_vl01/documents/part-000000123.parquet  the documents of unit 123
    OUT/_vl01/markdown/NAME.md                  the text of the document NAME
    OUT/_vl01/markdown/FILE/MEMBER.md           of one in a list, a tar or a Parquet file; the
                                                address, name or row percent-encoded

A unit holds whole documents, so each of these parts follows from one part of the dataset; it is
written again when that one has changed. Holds one unit in memory for each of a few threads.
"""

import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.formats.tar import is_document_member
from pipeline.ledger import Ledger
from pipeline.lists import is_one_row
from pipeline.plan import row_id, units_of
from pipeline.sources import Source
from pipeline.storage import PatientFile, make_folder
from schemas.errors import LedgerError, Reason
from schemas.job import Job
from schemas.ledger import Unit, UnitKind
from schemas.rows import DOCUMENTS, Status

SEPARATOR = "\n\n"  # between two pages that have a text
_UNOPENED = (Reason.ENCRYPTED, Reason.EMPTY_SOURCE, Reason.SOURCE_DAMAGED, Reason.TOO_MANY_PAGES)
_COLUMNS = ["row_id", "source", "member", "page", "status", "reason", "text"]
_FOLDER = "documents"
_OF_PART = b"vl01.part_sha256"  # of the part that the documents follow from
_MARKDOWN = b"vl01.markdown"  # whether their .md files were written before them
_UP = (".", "..")
_LONGEST_NAME = 250  # bytes; with .md, what file systems take
_THREADS = 4
_AHEAD = 256


def write_documents(job: Job, ledger: Ledger, source: Source) -> None:
    """Brings the documents of all committed units up to date, if the job asks for them or an
    earlier run wrote some. Only for who has the lease. Raises LedgerError.
    """
    there = ledger.fs.exists(_path(ledger, _FOLDER))
    if not (there or job.documents or job.markdown):
        return
    try:
        make_folder(ledger.fs, _path(ledger, _FOLDER))
        with ThreadPoolExecutor(_THREADS) as pool:
            for units in _committed(ledger):
                list(pool.map(lambda unit: _write_unit(ledger, source, unit, job.markdown), units))
    except LedgerError:
        raise
    except Exception as error:  # storage clients raise far more than OSError
        raise LedgerError(
            f"cannot write the documents of {ledger.output}: {error}. All rows are committed; the"
            " same command writes what is left"
        ) from error


def join_pages(source: str, member: str | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A row in the DOCUMENTS schema, of the OUTPUT rows of one document, in any order.

    A page without a text takes no place; what could not be opened or reached has no number and
    comes last.
    """
    rows = sorted(rows, key=lambda row: (row["page"] is None, row["page"]))
    pieces: list[str] = []
    length = 0
    pages = []
    for row in rows:
        text = row["text"] or ""
        if text and length:
            pieces.append(SEPARATOR)
            length += len(SEPARATOR)
        pages.append(
            {name: row[name] for name in ("page", "row_id", "status", "reason")}
            | {"start": length, "end": length + len(text)}
        )
        pieces.append(text)
        length += len(text)
    statuses = Counter(row["status"] for row in rows)
    return {
        "source": source,
        "member": member,
        "page_count": max((row["page"] for row in rows if row["page"] is not None), default=None),
        "text": "".join(pieces),
        **{status.value: statuses[status.value] for status in Status},
        "pages": pages,
    }


def _committed(ledger: Ledger) -> Iterator[list[Unit]]:
    done = ledger.committed()
    for table in ledger.planned():
        units = [u for u in units_of(table) if done[u.number] and u.may_hold_documents]
        for start in range(0, len(units), _AHEAD):  # `map` does not wait for its reader
            yield units[start : start + _AHEAD]


def _write_unit(ledger: Ledger, source: Source, unit: Unit, markdown: bool) -> None:
    sha256 = ledger.record(unit.number).sha256.encode()
    name = f"{_FOLDER}/{ledger.part_name(unit.number)}"
    written = _metadata(ledger, name)
    markdown = markdown or written.get(_MARKDOWN) == b"1"
    if written.get(_OF_PART) == sha256 and (written.get(_MARKDOWN) == b"1") == markdown:
        return
    documents = list(_documents(ledger, source, unit))
    if markdown:
        for vanished in _written_names(ledger, unit, name) - {found for found, _ in documents}:
            _write_markdown(ledger, vanished, None)
        for document_name, document in documents:
            some = document[Status.FAILED] < len(document["pages"])
            _write_markdown(ledger, document_name, document["text"] if some else None)
    table = pa.Table.from_pylist([document for _, document in documents], DOCUMENTS)
    metadata = {_OF_PART: sha256, _MARKDOWN: b"1" if markdown else b"0"}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    ledger.write(name, sink.getvalue().to_pybytes())


def _documents(ledger: Ledger, source: Source, unit: Unit) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, its row in the DOCUMENTS schema) of each, in the order of the unit."""
    part = pq.read_table(io.BytesIO(ledger.read_part(unit.number)), columns=_COLUMNS)
    rows: defaultdict[tuple[str, str | None], list[dict[str, Any]]] = defaultdict(list)
    for row in part.to_pylist():
        rows[row["source"], row["member"]].append(row)
    for name, member in _items(unit, rows):
        address = source.full_address(name)
        found = rows.get((address, member))
        if found and _is_document(unit.kind, member, found):
            yield _document_name(name, member), join_pages(address, member, found)


def _items(unit: Unit, rows: Iterable[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
    """Those of a unit; of a tar or a Parquet file only its rows tell them."""
    if unit.kind in (UnitKind.TAR, UnitKind.PARQUET):
        return [(unit.names[0], member) for _, member in rows]
    return unit.items


def _is_document(kind: UnitKind, member: str | None, rows: list[dict[str, Any]]) -> bool:
    """Whether these rows, all there are of one file or member, are of a document. In a Parquet file
    nothing tells it but its pages, or why there are none."""
    if kind is UnitKind.TAR:
        return member is not None and is_document_member(member)
    if kind is UnitKind.PARQUET:
        return member is not None and any(
            row["page"] is not None or row["reason"] in _UNOPENED for row in rows
        )
    return not (member and is_one_row(member))


def _document_name(name: str, member: str | None) -> str:
    """What its .md is named after: an address, which may hold anything, as one step of a path. The
    key of an object may have `..` for a step, and must not lead out of the folder."""
    name = "/".join(step.replace(".", "%2E") if step in _UP else step for step in name.split("/"))
    return name if member is None else f"{name}/{quote(member, safe='')}"


def _metadata(ledger: Ledger, name: str) -> dict[bytes, bytes]:
    """Of a part that was written before; empty if there is none."""
    try:
        with PatientFile(ledger.fs, _path(ledger, name), cache_type="none") as file:
            return pq.ParquetFile(file).schema_arrow.metadata or {}
    except FileNotFoundError:
        return {}


def _written_names(ledger: Ledger, unit: Unit, name: str) -> set[str]:
    """What the .md files of documents inside of a unit's file are named after, by a part that was
    written before."""
    try:
        with PatientFile(ledger.fs, _path(ledger, name), cache_type="none") as file:
            members = pq.ParquetFile(file).read(["member"])["member"].drop_null().to_pylist()
    except FileNotFoundError:
        return set()
    return {_document_name(unit.names[0], member) for member in members}


def _write_markdown(ledger: Ledger, name: str, text: str | None) -> None:
    """Without a text no file: nor one of what the document was before it was changed."""
    folders, _, base = f"markdown/{name}".rpartition("/")
    if len(base.encode()) > _LONGEST_NAME:
        base = row_id(name)
    file = f"{folders}/{base}.md"
    if text is not None:
        make_folder(ledger.fs, _path(ledger, folders))
        ledger.write(file, text.encode())
    elif ledger.fs.exists(_path(ledger, file)):
        ledger.remove(file)


def _path(ledger: Ledger, name: str) -> str:
    return f"{ledger.root}/_vl01/{name}"
