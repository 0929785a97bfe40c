"""What `make` installs is what the project declares, and the same on every machine."""

import re
import tomllib
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[2]


def names(lines: list[str]) -> set[str]:
    """Distribution names, normalised as https://peps.python.org/pep-0503 says."""
    found = (re.match(r"[A-Za-z0-9._-]+", line) for line in lines)
    return {re.sub(r"[-_.]+", "-", match.group()).lower() for match in found if match}


def pinned() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_no_dependency_is_left_to_the_day_it_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    assert names(declared) - {"vl01-batch"} <= names(pinned())
    assert all("==" in line for line in pinned())


def test_no_build_of_torch_is_forced_on_a_host():
    assert not [line for line in pinned() if "+" in line or "://" in line]
