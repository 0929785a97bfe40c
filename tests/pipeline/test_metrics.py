"""What Prometheus finds is what was committed, under the names that the dashboard draws."""

import json
import re
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from model.engine.engine import EngineStatistics, Occupancy
from pipeline import metrics
from pipeline.metrics import ReplicaMetrics, RunMetrics
from pipeline.placement import ray_session
from schemas.ledger import Work

WORK = Work(
    run="run",
    at="2026-01-01T00:00:00+00:00",
    statuses={"ok": 3, "failed": 2},
    reasons={"decode_error": 2},
    prompt_tokens=700,
    output_tokens=40,
)
DASHBOARD = Path(__file__).parents[2] / "jobs/deploy/grafana.json"


@pytest.fixture(scope="module")
def scraped() -> dict[str, float]:
    """Series at the endpoint of this node, by name and labels, after some were set."""
    with ray_session("local"):
        of_run = RunMetrics("/data/out")
        of_run.committed(WORK)
        of_run.committed(WORK)
        of_run.units(left=7, begun=2)
        RunMetrics("/data/Büro %").committed(WORK)
        engine = SimpleNamespace(
            statistics=EngineStatistics(9, prompt_tokens=600, output_tokens=60, preemptions=1),
            occupancy=Occupancy(running=3, slots=0.75, blocks=0.5),
            unfinished=8,
            rank_busy_seconds=(10.0, 20.0),
        )
        of_replica = ReplicaMetrics(engine)  # type: ignore[arg-type]
        time.sleep(metrics._SECONDS_BETWEEN)
        of_replica.look(step_seconds=1.0, inbox=4)
        engine.rank_busy_seconds = (11.0, 20.5)
        engine.statistics = EngineStatistics(12, 1200, 120, 1)
        time.sleep(metrics._SECONDS_BETWEEN)
        of_replica.look(step_seconds=1.0, inbox=4)
        port = ray.nodes()[0]["MetricsExportPort"]
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                found = parsed(answer.read().decode())
            if any("replica_preemptions" in name for name in found):
                return found
            time.sleep(1)
    pytest.fail("no series of this project at Ray's endpoint within a minute")


def parsed(text: str) -> dict[str, float]:
    """{name{status="ok"}: value} of the lines that are ours, with the labels that are ours."""
    found = {}
    for line in text.splitlines():
        if match := re.match(r"(ray_vl01_\w+)\{(.*)\} (\S+)$", line):
            name, labels, value = match.groups()
            ours = re.findall(r'(?:output|status|reason|kind|state|pool|rank)="[^"]*"', labels)
            found[f"{name}{{{','.join(sorted(ours))}}}"] = float(value)
    return found


@pytest.mark.slow
def test_prometheus_counts_what_was_committed(scraped):
    where = 'output="/data/out"'
    assert scraped[f'ray_vl01_rows_total{{{where},status="ok"}}'] == 6
    assert scraped[f'ray_vl01_rows_total{{{where},status="failed"}}'] == 4
    assert scraped[f'ray_vl01_row_reasons_total{{{where},reason="decode_error"}}'] == 4
    assert scraped[f'ray_vl01_tokens_total{{kind="prompt",{where}}}'] == 1400
    assert scraped[f"ray_vl01_units_left{{{where}}}"] == 7
    assert scraped[f"ray_vl01_units_begun{{{where}}}"] == 2


@pytest.mark.slow
def test_an_output_whose_name_is_not_ascii_is_counted_and_stops_no_run(scraped):
    assert scraped['ray_vl01_rows_total{output="/data/B%C3%BCro %",status="ok"}'] == 3


@pytest.mark.slow
def test_prometheus_sees_how_full_a_replica_is(scraped):
    assert scraped['ray_vl01_replica_sequences{state="running"}'] == 3
    assert scraped['ray_vl01_replica_sequences{state="waiting"}'] == 5
    assert scraped['ray_vl01_replica_memory_ratio{pool="slots"}'] == 0.75
    assert scraped["ray_vl01_replica_inbox{}"] == 4
    assert 0.3 < scraped["ray_vl01_replica_busy_ratio{}"] <= 0.5
    assert 200 < scraped['ray_vl01_replica_tokens_per_second{kind="prompt"}'] <= 300
    assert 0.3 < scraped['ray_vl01_rank_busy_ratio{rank="0"}'] <= 0.5
    assert 0.1 < scraped['ray_vl01_rank_busy_ratio{rank="1"}'] <= 0.25


@pytest.mark.slow
def test_the_dashboard_draws_series_that_exist(scraped):
    names = {name.partition("{")[0] for name in scraped}
    drawn = set(re.findall(r"ray_vl01_\w+", DASHBOARD.read_text()))
    assert drawn <= names
    assert len(drawn) >= 8


def test_the_dashboard_is_one_that_grafana_can_import():
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["title"]
    for panel in dashboard["panels"]:
        assert panel["targets"], panel["title"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert all(
            target["expr"].count("(") == target["expr"].count(")") for target in panel["targets"]
        )
