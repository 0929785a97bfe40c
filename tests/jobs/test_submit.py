"""`vl01 submit`: the run's own words and exit code come back from the cluster, whatever breaks."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from ray.job_submission import JobStatus

from jobs import submit as module
from jobs.submit import submit
from model.nano.random_checkpoint import write_random_checkpoint
from schemas.errors import ConfigError, ExitCode, StoppedError
from schemas.job import Job

JOB = Job.model_validate(
    {"source": "/photos", "output": "/out", "model": "/ckpt", "prompt": "Was zeigt das Bild? 🖼"}
)


class FakeClient:
    """A job server that loses the connection after `breaks` lines, once, and then ends the run."""

    def __init__(self, exit_code: int | None, breaks: int | None = None) -> None:
        self.submitted = {}
        self._lines = ["[00:00] listing\n", "[00:30] 9 rows\n", "output /out\n"]
        self._breaks = breaks
        self._exit_code = exit_code

    def submit_job(self, **how) -> str:
        self.submitted = how
        return "raysubmit_1"

    async def tail_job_logs(self, name):
        breaks, self._breaks = self._breaks, None
        for number, line in enumerate(self._lines):
            if number == breaks:
                raise RuntimeError("WebSocket connection closed unexpectedly")
            yield line

    def get_job_info(self, name):
        status = JobStatus.SUCCEEDED if self._exit_code == 0 else JobStatus.FAILED
        return SimpleNamespace(status=status, driver_exit_code=self._exit_code, message="it ended")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.01)

    def make(exit_code: int | None, breaks: int | None = None) -> FakeClient:
        client = FakeClient(exit_code, breaks)
        monkeypatch.setattr(module, "_connect", lambda address: client)
        return client

    return make


@pytest.mark.parametrize("code", [ExitCode.OK, ExitCode.USAGE, ExitCode.STRICT])
def test_a_failed_run_does_not_look_like_a_good_one(server, code):
    server(code)
    assert submit(JOB, "http://head:8265", True, lambda text: None) == code


def test_no_line_is_lost_or_shown_twice_when_the_connection_breaks(server):
    for breaks in (1, 2):
        shown: list[str] = []
        server(0, breaks)
        submit(JOB, "http://head:8265", True, shown.append)
        text = "".join(shown).partition("\n")[2]
        assert text == "[00:00] listing\n[00:30] 9 rows\noutput /out\n"


def test_a_connection_that_breaks_after_hours_is_tried_again_as_one_after_seconds(
    server, monkeypatch
):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: None)
    monkeypatch.setattr(module, "time", clock)
    client, shown = server(0, breaks=2), []
    tail = client.tail_job_logs

    async def slow_tail(name):
        async for line in tail(name):
            now[0] += 7200
            yield line

    monkeypatch.setattr(client, "tail_job_logs", slow_tail)
    assert submit(JOB, "http://head:8265", True, shown.append) == ExitCode.OK
    assert "".join(shown[1:]) == "".join(client._lines)


def test_a_cluster_that_never_answers_again_is_given_up(server, monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + 5)
    )
    monkeypatch.setattr(module, "time", clock)
    client = server(0)
    monkeypatch.setattr(client, "tail_job_logs", lambda name: 1 / 0)
    with pytest.raises(StoppedError, match="lost sight of raysubmit_1, which may go on"):
        submit(JOB, "http://head:8265", True, lambda text: None)
    assert 300 <= now[0] <= 320


@pytest.mark.parametrize("code", [None, -9, 137])
def test_a_killed_run_is_not_a_finished_one(server, code):
    server(code)
    with pytest.raises(StoppedError, match="it ended"):
        submit(JOB, "http://head:8265", True, lambda text: None)


def test_a_cluster_without_vl01_is_told_so(server):
    server(127)
    with pytest.raises(ConfigError, match="no `vl01` on the cluster"):
        submit(JOB, "http://head:8265", True, lambda text: None)


def test_the_cluster_runs_the_same_job_on_itself(server):
    client = server(0)
    submit(JOB, "http://head:8265", False, lambda text: None)
    sent = client.submitted["runtime_env"]["env_vars"]["VL01_JOB"]
    assert Job.model_validate(json.loads(sent)) == JOB.model_copy(update={"address": "auto"})


def test_a_cluster_that_is_not_there_is_a_usage_error():
    with pytest.raises(ConfigError, match=r"cannot submit to http://127\.0\.0\.1:1: .*8265"):
        submit(JOB, "http://127.0.0.1:1", True, lambda text: None)


def test_an_address_without_a_scheme_is_the_job_server_too_and_not_waited_for():
    port = free_port()
    started = time.monotonic()
    with pytest.raises(ConfigError, match=f"Failed to connect.*http://127.0.0.1:{port}"):
        submit(JOB, f"127.0.0.1:{port}", True, print)
    assert time.monotonic() - started < 20


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def cluster(tmp_path):
    """A Ray head with token authentication: the address of its job server, and the environment."""
    port, folder = free_port(), Path("/tmp") / f"vl01-ray-{os.getpid()}"  # socket paths are short
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *("--num-cpus=2", "--disable-usage-stats", f"--temp-dir={folder}"),
        *(f"--port={free_port()}", f"--dashboard-port={port}"),
    ]
    with (tmp_path / "ray.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_it_answers(address, head)
            yield address, environment
        finally:
            head.terminate()
            head.wait(60)
            subprocess.run(["rm", "-rf", folder], check=True)


def _wait_until_it_answers(address: str, head: subprocess.Popen) -> None:
    host, _, port = address.removeprefix("http://").partition(":")
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and head.poll() is None:
        with socket.socket() as client:
            if client.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.5)
    pytest.fail("the Ray head did not start")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_exit_codes_come_back_from_a_cluster_that_asks_for_a_token(cluster, tmp_path):
    address, environment = cluster
    write_random_checkpoint(tmp_path / "ckpt", hidden_size=64, layers=8, vision_layers=1)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (80, 60), "teal").save(tmp_path / "photos/a.png")
    (tmp_path / "photos/b.png").write_bytes(b"not an image")
    keys = ["source: photos", "output: out", "model: ckpt", "max_new_tokens: 4"]

    def vl01_submit(*more: str, token: str | None = None) -> tuple[int, str]:
        (tmp_path / "job.yaml").write_text("\n".join([*keys, *more]))
        done = subprocess.run(
            [sys.executable, "-m", "jobs", "submit", "job.yaml", "--address", address],
            cwd=tmp_path,
            env=environment | ({"RAY_AUTH_TOKEN": token} if token else {}),
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    code, said = vl01_submit("strict: true")
    assert code == ExitCode.STRICT, said
    assert "2 rows" in said
    assert "1 failed" in said
    assert vl01_submit()[0] == ExitCode.OK  # nothing is left to do
    code, said = vl01_submit("seed: 1")
    assert code == ExitCode.USAGE
    assert "another job" in said or "seed" in said
    code, said = vl01_submit(token="f" * 64)
    assert code == ExitCode.USAGE
    assert "Authentication" in said
