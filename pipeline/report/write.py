"""Makes both files of a report: collect, find the pictures, write."""

from dataclasses import dataclass, replace

from pipeline.ledger import Ledger
from pipeline.report.collect import collect
from pipeline.report.contact_sheet import Cell, contact_sheet
from pipeline.report.html import page
from schemas.errors import ConfigError
from schemas.report import Report, Sampled


@dataclass(frozen=True)
class Written:
    """html: the full address of the page; report.json is beside it."""

    report: Report
    html: str


def write_report(
    output: str,
    endpoint_url: str | None = None,
    gpu_hour_price: float | None = None,
    seed: int = 0,
) -> Written:
    """Writes _vl01/report.json and _vl01/report.html anew.

    endpoint_url: of OUT, and of the source unless the job knows better. Raises ConfigError when
    OUT is no dataset of this tool or cannot be written.
    """
    ledger = Ledger.of_dataset(output, endpoint_url)
    collected = collect(ledger, gpu_hour_price, seed)
    cells = contact_sheet(ledger, collected.picks, endpoint_url)
    report = replace(collected.report, sampled=tuple(map(_sampled, cells)))
    try:
        ledger.write("report.json", report.to_json())
        ledger.write("report.html", page(report, ledger.job["job"], cells).encode())
    except Exception as error:  # storage clients raise far more than OSError
        raise ConfigError(f"cannot write the report to {ledger.output}: {error}") from error
    return Written(report, f"{ledger.output}/_vl01/report.html")


def _sampled(cell: Cell) -> Sampled:
    row = cell.row
    return Sampled(
        row["row_id"], cell.why, row["source"], row["member"], row["page"], row["status"]
    )
