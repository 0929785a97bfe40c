"""The measurement of the whole network, small and on a CPU: it sees what was killed and lost."""

import json

import pytest

from tests.gpu import bench_whole
from tests.gpu.bench_whole import Look, Watch


def test_a_replica_that_waits_for_another_one_is_seen():
    watch = Watch(run=None, output=None, kill_after=None)  # pyright: ignore[reportArgumentType]
    commits = [0, 0, 1, 2, 2, 2, 3, 4]
    busy = [(90, 90), (0, 0), (99, 99), (97, 98), (0, 97), (2, 99), (95, 98), (0, 0)]
    watch.looks = [
        Look(float(second), done, ((1024 * second, first), (512, second_gpu)))
        for second, (done, (first, second_gpu)) in enumerate(zip(commits, busy, strict=True))
    ]
    assert watch.pauses() == {"between_commits": 3.0, "of_gpus": [2, 0]}
    assert watch.most_memory() == [7.0, 0.5]


@pytest.mark.slow
def test_a_rank_that_is_killed_is_told_and_every_image_is_there_once(tmp_path, capfd):
    """The numbers are of rows that `vl01 verify` has seen, or there are none."""
    line = "--width tiny --layers 4 --device cpu --photos 60 --new 8 --pp 2 --unit-rows 4"
    bench_whole.main([*line.split(), "--kill-after", "0", "--json", str(tmp_path / "numbers.json")])
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["images"] == 60
    assert numbers["run"]["restarts"] == 1
    assert len(numbers["run"]["rank_busy"]) == 2
    assert numbers["images_per_second"] > 0
    told = capfd.readouterr().out
    assert "killing" in told
    assert "restarts of replicas: 1" in told
