"""The command as users run it: `vl01` in its own process, real Ray, two ranks, kills."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from decimal import Decimal
from functools import partial
from pathlib import Path

import duckdb
import psutil
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from model.nano.random_checkpoint import write_random_checkpoint
from tests.images import bad_images, good_images
from tests.sources import write_source

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

START_SECONDS = 300  # for a run to write its first commit record, on a busy machine of two cores


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), tile=56)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "jobs", *map(str, arguments)]


def caption(source: object, output: object, checkpoint: object, *flags: object) -> list[str]:
    small = ["--unit-rows", 8, "--max-new-tokens", 8, "--max-sequences", 8, "--prompt", "Say it."]
    return command("caption", source, "--output", output, "--model", checkpoint, *small, *flags)


def run(arguments: list[str], expected: int = 0) -> subprocess.CompletedProcess[str]:
    finished = subprocess.run(arguments, capture_output=True, text=True, timeout=400)
    assert finished.returncode == expected, finished.stdout + finished.stderr
    return finished


def read(output: Path) -> pa.Table:
    return ds.dataset(output, format="parquet").to_table()


def records(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "_vl01" / "commits").glob("*.json")}


def has_more_records(output: Path, than: int) -> bool:
    return len(records(output)) > than


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to everything the run started, the driver first: nothing gets to tidy up."""
    root = psutil.Process(process.pid)
    for victim in [root, *root.children(recursive=True)]:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert process.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.05)


RANK, REPLICA = "model.engine.rank_worker", "MapBatches(Generate)"


def under(process: subprocess.Popen, name: str) -> list[psutil.Process]:
    """The processes of a run whose command line holds the name."""
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if name in " ".join(_command_line(child))
    ]


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_bad_images_cost_their_own_rows_and_every_image_is_a_row(tmp_path, checkpoint):
    bad = bad_images()
    images = good_images(40) + [(name, data) for name, data, _ in bad]
    write_source(tmp_path / "source", images)
    output = tmp_path / "out"
    shown = run(caption(tmp_path / "source", output, checkpoint, "--keep", "url", "--pp", 2))

    rows = read(output).to_pylist()
    expected = Counter({reason.value: 0 for _, _, reason in bad})
    expected.update(reason.value for _, _, reason in bad)
    assert len(rows) == len({row["row_id"] for row in rows}) == len(images)
    assert Counter(row["reason"] for row in rows if row["status"] == "failed") == expected
    assert all(row["text"] for row in rows if row["status"] != "failed")
    assert {row["url"] for row in rows if row["source"].endswith(".parquet")} == {
        f"https://example.org/{name}" for name, _ in images[2::3]
    }
    assert f"{len(bad)} failed" in shown.stdout
    assert "Traceback" not in shown.stderr
    run(command("verify", output, "--deep"))


def test_a_run_killed_three_times_writes_every_row_once_and_redoes_no_finished_unit(
    tmp_path, checkpoint
):
    images = good_images(90)
    write_source(tmp_path / "source", images)
    output = tmp_path / "out"
    arguments = caption(tmp_path / "source", output, checkpoint, "--pp", 2)
    done: dict[str, bytes] = {}
    for _ in range(3):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(partial(has_more_records, output, len(done)), process)
        kill_tree(process)
        now = records(output)
        assert done.items() <= now.items()
        done = now
        run(command("verify", output), expected=4)

    run(arguments)
    assert done.items() <= records(output).items()
    rows = read(output)["row_id"].to_pylist()
    assert len(rows) == len(set(rows)) == len(images)
    run(command("verify", output, "--deep"))


@pytest.mark.parametrize(
    ("who", "blow"), [(RANK, signal.SIGKILL), (RANK, signal.SIGSTOP), (REPLICA, signal.SIGSTOP)]
)
def test_a_rank_or_a_replica_killed_or_stopped_alone_is_replaced_and_no_row_is_lost_or_doubled(
    tmp_path, checkpoint, who, blow
):
    images = good_images(60)
    write_source(tmp_path / "source", images)
    output = tmp_path / "out"
    process = subprocess.Popen(
        caption(tmp_path / "source", output, checkpoint, "--pp", 2),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: len(records(output)) >= 1, process)
    victim = under(process, who)[-1]
    os.kill(victim.pid, blow)
    wait_for(lambda: victim.pid not in {other.pid for other in under(process, who)}, process)
    assert process.wait(timeout=400) == 0
    rows = read(output).to_pylist()
    assert len(rows) == len({row["row_id"] for row in rows}) == len(images)
    assert {row["status"] for row in rows} <= {"ok", "truncated"}
    run(command("verify", output, "--deep"))


SCHEMA = {
    "type": "object",
    "properties": {
        "total": {"type": ["number", "null"], "multipleOf": 0.01},
        "day": {"type": "string", "format": "date"},
        "tags": {"type": "array", "maxItems": 2, "items": {"type": "string", "maxLength": 3}},
    },
    "required": ["total", "day", "tags"],
}


def test_fields_are_typed_columns_also_after_a_retry_without_the_schema_file(tmp_path, checkpoint):
    write_source(tmp_path / "source", good_images(12))
    broken = tmp_path / "source" / "loose" / "broken.jpg"
    broken.write_bytes(b"no image yet")
    schema, output = tmp_path / "schema.json", tmp_path / "out"
    schema.write_text(json.dumps(SCHEMA))
    arguments = ["--schema", schema, "--temperature", 1, "--max-new-tokens", 80, "--unit-rows", 8]
    run(command("extract", tmp_path / "source", "--output", output, "--model", checkpoint,
                "--max-sequences", 8, *arguments))  # fmt: skip
    schema.unlink()
    broken.write_bytes(good_images(1)[0][1])
    run(command("retry", output))
    run(command("verify", output, "--deep"))

    table = f"'{output}/part-*.parquet'"
    statuses = dict(duckdb.execute(f"select status, count(*) from {table} group by 1").fetchall())
    assert statuses.keys() <= {"ok", "truncated"}
    assert sum(statuses.values()) == 13
    assert statuses["ok"] >= 7
    rows = duckdb.execute(
        f"select text, data.total, data.day, data.tags, confidence.day from {table}"
        " where status = 'ok'"
    ).fetchall()
    for text, total, day, tags, sure in rows:
        found = json.loads(text, parse_float=Decimal)
        assert (total, str(day), tags) == (found["total"], found["day"], found["tags"])
        assert 0 < sure < 1


def test_the_same_job_on_s3_writes_the_same_rows(tmp_path, checkpoint, monkeypatch):
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(key, "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import s3fs

        bucket = s3fs.S3FileSystem(endpoint_url=endpoint)
        bucket.mkdir("images")
        write_source(tmp_path / "source", good_images(18))
        bucket.put(str(tmp_path / "source"), "images/source", recursive=True)
        bucket.put(str(checkpoint), "images/bf16", recursive=True)

        run(caption(tmp_path / "source", tmp_path / "out", checkpoint))
        there = "s3://images/out", "--endpoint-url", endpoint
        model = "s3://images/int8"
        run(command("quantize", "s3://images/bf16", model, *there[1:]))
        run(caption("s3://images/source", there[0], model, *there[1:], "--pp", 2))
        run(command("verify", *there))
        remote = ds.dataset("images/out", format="parquet", filesystem=bucket).to_table()
        columns = [name for name in remote.column_names if name != "source"]
        assert remote.select(columns).sort_by("row_id") == read(tmp_path / "out").select(
            columns
        ).sort_by("row_id")
    finally:
        server.stop()
