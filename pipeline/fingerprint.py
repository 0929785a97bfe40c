"""Whether an output is of this tool and of this job, and what differs. Opens nothing."""

import json
from typing import Any

from schemas.errors import ConfigError

_LONGEST = 80  # characters of a value that is told


def refuse_another_job(output: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises ConfigError, which names the keys that differ. there: as job.json holds it."""
    here = json.loads(json.dumps(here))
    differ = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    if differ:
        values = "; ".join(
            f"{key} is {_short(there.get(key))} there and {_short(here.get(key))} now"
            for key in differ
        )
        raise ConfigError(
            f"{output} holds the rows of another job: {values}. "
            "Give another output, or the settings it was started with"
        )


def no_dataset(output: str) -> ConfigError:
    """For a command that is about a dataset which is there."""
    return ConfigError(
        f"{output} holds no dataset of this tool: no _vl01/job.json there; expected the output of"
        " a run"
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
