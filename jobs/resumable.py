"""What becomes of Ctrl-C while a run or a retry works, and of a disk that is full."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from jobs import show
from schemas.errors import ExitCode, StoppedError


@contextmanager
def resumable() -> Iterator[None]:
    """One line and the exit code of a run that can go on. Raises StoppedError for an error of the
    system, which nobody below has taken for one of a row, a unit or a setting."""
    try:
        yield
    except KeyboardInterrupt:
        show.error("stopped. What is committed stays; the same command goes on from there.")
        raise typer.Exit(ExitCode.STOPPED) from None
    except OSError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StoppedError(
            f"stopped: {reason} (--debug shows where). What is committed stays; the same command"
            " goes on from there."
        ) from error
