"""The demo's own pages, and how it shows answers; the demo as a whole is `make demo`."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import demo
from model.nano.quality import FONTS, held_out_pages
from model.nano.tasks import answers
from pipeline.plan import Plan
from pipeline.read import ReadSettings, read_unit
from pipeline.sources import open_source


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "PAGES", tmp_path / "pages")
    monkeypatch.setattr(demo, "ANSWERS", tmp_path / "answers")
    return tmp_path


@pytest.fixture
def truths(folder):
    return demo.write_source(held_out_pages(demo.COUNT, FONTS["training fonts"], demo.SEED))


def test_every_page_lies_where_its_row_will_say(folder, truths):
    """Row by row as a run reads them, but for the damaged file, which no truth is known of."""
    source = open_source(str(folder / "pages"))
    plan = Plan(source, 100)
    settings = ReadSettings(source, 10_000_000, kept=plan.kept())
    rows = [
        row
        for unit in plan.units()
        for table in read_unit(unit, settings)
        for row in table.select(["source", "member", "page"]).to_pylist()
    ]
    known = [page for row in rows if (page := demo.truth(row, truths))]
    assert sorted(map(id, known)) == sorted(map(id, truths.values()))
    assert len(rows) == len(known) + 1
    assert len(truths) == demo.COUNT
    kinds = {name: {truths[place].content.kind for place in truths if place[0] == name}
             for name in ("receipts.tar", "invoices.parquet", "rest.pdf")}  # fmt: skip
    assert kinds["receipts.tar"] == {"receipt"}
    assert kinds["invoices.parquet"] == {"invoice"}
    assert len(kinds["rest.pdf"]) > 2


def test_the_damaged_file_is_damaged(folder, truths):
    with pytest.raises(OSError, match=r"truncated|broken"):
        Image.open(folder / "pages" / "damaged.png").load()


def test_answers_are_shown_beside_the_truth_of_the_same_page(folder, truths, capsys):
    """Datasets that say the truth of every page: both columns of each table are then the same."""
    for name, task in set(demo.SHOWN):
        told = [(place, answers(page.content)) for place, page in truths.items()]
        rows = [row(file, inside, said[task].text) for (file, inside), said in told if task in said]
        (folder / "answers" / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / "answers" / name / "part-0.parquet")
    demo.show_answers(truths)
    shown = capsys.readouterr().out
    rows = [line.split("│")[1:3] for line in shown.splitlines() if "│" in line]
    assert len(rows) > 20
    assert all(left.strip() == right.strip() for left, right in rows)
    assert shown.count("100.0%") == 3


def row(file, inside, text):
    """As the datasets of the commands hold it."""
    member, page = (None, inside) if isinstance(inside, int) else (inside, None)
    return {"source": f"pages/{file}", "member": member, "page": page, "text": text}


def test_without_its_checkpoint_the_demo_says_so(folder, monkeypatch):
    monkeypatch.setattr(demo, "CHECKPOINT", folder / "none")
    with pytest.raises(SystemExit, match="no checkpoint in"):
        demo.main()
