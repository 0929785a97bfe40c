"""A JSON object of a checkpoint, whose errors name the file and the key. Knows no key."""

import json
from typing import Any

from model.files import Folder
from schemas.errors import CheckpointError


class Section:
    """path: of the file, and of the key it is under, for errors."""

    def __init__(self, path: str, values: dict[str, Any]) -> None:
        self.path = path
        self._values = values

    @classmethod
    def of(cls, root: Folder, name: str) -> "Section":
        """What a file of a checkpoint holds. Raises CheckpointError."""
        return cls(root.describe(name), _read(root, name))

    def get(self, *names: str, default: Any = None) -> Any:
        """The value under the first of `names` that is present and not null."""
        found = (self._values[name] for name in names if self._values.get(name) is not None)
        return next(found, default)

    def need(self, *names: str) -> Any:
        value = self.get(*names)
        if value is None:
            raise CheckpointError(f"{self.path} lacks {' or '.join(names)}.")
        return value

    def expect(self, name: str, *supported: Any) -> None:
        """An absent key means the first of `supported`, the released value."""
        value = self._values.get(name, supported[0])
        if value not in supported:
            raise CheckpointError(
                f"{self.path} says {name} = {value!r}; this program computes only "
                f"{' or '.join(repr(s) for s in supported)}."
            )

    def section(self, name: str, *, optional: bool = False) -> "Section":
        values = self.get(name, default={}) if optional else self.need(name)
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.path}: {name} is {values!r}; expected an object.")
        return Section(f"{self.path}: {name}", values)


def _read(root: Folder, name: str) -> dict[str, Any]:
    try:
        values = json.loads(root.read(name))
    except FileNotFoundError:
        raise CheckpointError(
            f"{root} has no {name}. Expected the folder of a MiniMax-VL-01 checkpoint."
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{root.describe(name)} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{root.describe(name)} holds {type(values).__name__}; expected an object."
        )
    return values
