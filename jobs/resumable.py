"""What becomes of Ctrl-C while a run or a retry works."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from jobs import show
from schemas.errors import ExitCode


@contextmanager
def resumable() -> Iterator[None]:
    """One line and the exit code of a run that can go on."""
    try:
        yield
    except KeyboardInterrupt:
        show.error("stopped. What is committed stays; the same command goes on from there.")
        raise typer.Exit(ExitCode.STOPPED) from None
