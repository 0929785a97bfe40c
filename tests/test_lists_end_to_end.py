"""Lists of addresses as a user runs them: `vl01` as a process, an http server of every kind."""

import subprocess
from collections import Counter
from functools import partial

import pytest

from model.nano.random_checkpoint import write_random_checkpoint
from tests import http_server
from tests.documents import pdf
from tests.http_server import serve
from tests.images import good_images
from tests.test_end_to_end import (
    caption,
    command,
    has_more_records,
    kill_tree,
    read,
    records,
    run,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), tile=56)


def test_a_list_with_hostile_servers_killed_resumed_and_tried_again_has_every_row(
    tmp_path, checkpoint
):
    images = good_images(30)
    files = {f"/{i:02}.jpg": data for i, (_, data) in enumerate(images)}
    with serve({**files, "/paper": pdf(["a", "b", "c"])}) as site:
        del site.files["/07.jpg"]
        site.answers["/drip.jpg"] = http_server.drip_body
        site.answers["/flood.jpg"] = http_server.flood
        site.answers["/bomb.jpg"] = http_server.bomb()
        site.answers["/busy.jpg"] = http_server.fail_then(2, 503, files["/01.jpg"])
        site.answers["/inside.jpg"] = http_server.redirect("http://169.254.169.254/latest/")
        more = ["/drip.jpg", "/flood.jpg", "/bomb.jpg", "/busy.jpg", "/inside.jpg", "/paper"]
        paths = [*files, *more, "/00.jpg"]
        rows = [f"{i},{site.url(path)}" for i, path in enumerate(paths)]
        (tmp_path / "list.csv").write_text("n,url\n" + "\n".join(rows))
        output = tmp_path / "out"
        flags = ["--keep", "n", "--unit-rows", 4, "--allow-host", "127.0.0.1"]
        flags += ["--fetch-seconds", 5, "--max-bytes", 5_000_000, "--max-failure-rate", 1]
        arguments = caption(tmp_path / "list.csv", output, checkpoint, *flags)

        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(partial(has_more_records, output, 1), process)
        kill_tree(process)
        done = records(output)
        run(arguments)
        assert done.items() <= records(output).items()
        run(command("verify", output, "--deep"))
        table = read(output).to_pylist()
        reasons = {"not_found": 1, "timeout": 1, "too_many_bytes": 2, "host_refused": 1}
        assert len(table) == len({row["row_id"] for row in table}) == len(paths) + 2
        assert Counter(row["reason"] for row in table if row["status"] == "failed") == reasons
        assert {row["page"] for row in table if row["n"] == "35"} == {1, 2, 3}
        assert {row["n"] for row in table} == {str(i) for i in range(len(paths))}

        site.files["/07.jpg"] = files["/07.jpg"]
        site.asked.clear()
        run(command("retry", output, "--reason", "not_found"))
        assert site.asked[0][0] == "/07.jpg"  # the pictures of the report come after it
        run(command("verify", output, "--deep"))
        mended = [row for row in read(output).to_pylist() if row["n"] == "7"]
        assert [row["status"] in ("ok", "truncated") for row in mended] == [True]
