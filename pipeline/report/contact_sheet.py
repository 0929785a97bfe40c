"""Pictures beside what was written: finds the rows in the parts and their pictures in the source.

What cannot be found, read in time or decoded is shown as missing: a report never fails for it.
"""

import base64
import io
import time
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from model.inputs.images import sixteen_bits, upright
from pipeline.ledger import Ledger
from pipeline.plan import units_of
from pipeline.read import ReadSettings, quickly, read_settings, read_unit
from pipeline.render.settings import PageSettings
from pipeline.report.sample import Pick
from pipeline.sources import open_source
from pipeline.storage import PatientFile
from schemas.job import Job
from schemas.ledger import Unit

THUMBNAIL = 360  # pixels of the longer side
_QUALITY = 72
_MOST_PIXELS = 100_000_000
_SECONDS = 30.0  # for all pictures; a tar has to be read as far as its last one
_PAGE_SECONDS = 5.0
_THREADS = 4
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "JPEG2000", "BMP")


@dataclass(frozen=True)
class Cell:
    """A row of the dataset on the sheet. picture: a data URI; without one, missing says why."""

    why: str
    row: dict[str, Any]
    picture: str | None = None
    missing: str = ""


def contact_sheet(ledger: Ledger, picks: list[Pick], endpoint_url: str | None) -> list[Cell]:
    """The cells of the rows picked, in that order. Takes half a minute at most, or little more."""
    rows = _rows(ledger, picks)
    cells = [Cell(pick.why, rows[pick[:2]]) for pick in picks if pick[:2] in rows]
    wanted: dict[int, dict[str, str | None]] = defaultdict(dict)
    for unit, position in rows:
        row = rows[unit, position]
        wanted[unit][row["row_id"]] = row["member"]
    try:
        pictures = _pictures(ledger, wanted, endpoint_url)
    except Exception as error:  # the source is gone, or its storage raises what it likes
        return [replace(cell, missing=f"the source cannot be read: {error}") for cell in cells]
    return [_with_picture(cell, pictures.get(cell.row["row_id"])) for cell in cells]


def _with_picture(cell: Cell, found: tuple[str | None, str] | None) -> Cell:
    picture, missing = found or (None, "not found in the source any more")
    return replace(cell, picture=picture, missing=missing)


def _rows(ledger: Ledger, picks: list[Pick]) -> dict[tuple[int, int], dict[str, Any]]:
    """The picked rows by unit and position; those of a part that cannot be read are left out."""
    positions: dict[int, list[int]] = defaultdict(list)
    for pick in picks:
        positions[pick.unit].append(pick.position)
    rows = {}
    for unit, wanted in positions.items():
        try:
            with PatientFile(ledger.fs, ledger.part_path(unit), cache_type="none") as file:
                source: Any = file
                found = _rows_at(pq.ParquetFile(source), wanted)
        except Exception:  # told in the report's problems
            continue
        rows |= {(unit, position): row for position, row in found.items()}
    return rows


def _rows_at(part: pq.ParquetFile, positions: list[int]) -> dict[int, dict[str, Any]]:
    rows, first = {}, 0
    for batch in part.iter_batches(4096, use_threads=False):
        for position in positions:
            if first <= position < first + batch.num_rows:
                rows[position] = batch.slice(position - first, 1).to_pylist()[0]
        first += batch.num_rows
    return rows


def _pictures(
    ledger: Ledger, wanted: dict[int, dict[str, str | None]], endpoint_url: str | None
) -> dict[str, tuple[str | None, str]]:
    """By row id: its picture, or why there is none. wanted: by unit, row ids and their members."""
    job = Job.model_validate(ledger.job["job"])
    source = open_source(job.source, endpoint_url or job.endpoint_url)
    pages = PageSettings(
        pinpoints=((2 * THUMBNAIL, 2 * THUMBNAIL),),
        max_pages=job.max_pages,
        page_seconds=_PAGE_SECONDS,
        document_seconds=_SECONDS,
    )
    settings = quickly(read_settings(job, source, pages))
    units = [
        replace(unit, only=frozenset(found)).narrowed(set(found.values()))
        for table in ledger.planned()
        for unit in units_of(table)
        if (found := wanted.get(unit.number))
    ]
    deadline = time.monotonic() + _SECONDS
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda unit: _of_unit(unit, settings, job.exif_rotate, deadline), units)
        return {row_id: answer for some in found for row_id, answer in some.items()}


def _of_unit(
    unit: Unit, settings: ReadSettings, exif_rotate: bool, deadline: float
) -> dict[str, tuple[str | None, str]]:
    left = set(unit.only or ())
    found: dict[str, tuple[str | None, str]] = {}
    try:
        for table in read_unit(unit, settings):
            for row in table.select(["row_id", "data", "reason", "message"]).to_pylist():
                if row["row_id"] in left:
                    left.remove(row["row_id"])
                    found[row["row_id"]] = _picture(row, exif_rotate)
            if not left or time.monotonic() > deadline:
                break
    except Exception as error:  # a source may change in any way after its run
        return found | dict.fromkeys(left, (None, f"cannot be read: {error}"))
    if time.monotonic() > deadline:
        found |= dict.fromkeys(left, (None, f"not reached within {_SECONDS:g} s"))
    return found


def _picture(row: dict[str, Any], exif_rotate: bool) -> tuple[str | None, str]:
    if row["data"] is None:
        return None, row["message"] or row["reason"] or "no data"
    try:
        return thumbnail(row["data"], exif_rotate), ""
    except UnidentifiedImageError:
        return None, "not an image"
    except Exception as error:  # whatever a decoder does on damaged data, it costs one picture
        return None, f"cannot be shown: {error}"


def thumbnail(data: bytes, exif_rotate: bool = False) -> str:
    """A small JPEG as a data URI, of untrusted bytes. Raises what Pillow raises, ValueError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, for images that are large or odd
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if image.width * image.height > _MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too many")
    image.draft("RGB", (THUMBNAIL * 2, THUMBNAIL * 2))  # JPEG: decodes no more than is shown
    if exif_rotate:
        image, _ = upright(image)
    if image.mode.startswith("I;16"):
        image = sixteen_bits(image).convert("I").point(lambda value: value / 256).convert("L")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    if image.mode != "RGB":
        image = image.convert("RGBA")  # palettes and masks may be transparent
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
