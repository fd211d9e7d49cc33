"""Everything that Fieldmark raises on purpose.

    FieldmarkError
    ├── DataError ────── PhotoError
    ├── TrainingError ── NonFiniteError
    └── ConfigError, WeightsError, ResourceError, RunError, PredictionError, ExportError, MissingExtraError,
        InterruptedRunError, ReportedElsewhereError

The command line turns each of them into one message and exit code 2, without a traceback: they are the user's to fix.
Anything else that escapes is a bug, and shows its traceback.
"""

import difflib
import shlex
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any


def did_you_mean(word: str, options: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> str:
    """Name the options most like `word`, whatever its case, as `; did you mean 'x' or 'y'?`; "" where none is like it.

    Raise `cutoff` (0 to 1, how alike they must be) where there are thousands of options.
    """
    by_lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(word.lower(), by_lower, n=most, cutoff=cutoff)
    return f"; did you mean {' or '.join(repr(by_lower[name]) for name in close)}?" if close else ""


def command(*words: object) -> str:
    """Write a command of ours as a shell takes it: what it needs quoted, such as a folder with a blank, is quoted."""
    return shlex.join(["fieldmark", *map(str, words)])


def first_line(error: BaseException) -> str:
    """Return what an error says in its first line, or else its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class FieldmarkError(Exception):
    """Is the base of all errors that a user can fix. The message says what was wrong, what was given, what to do.

    Examples:
        >>> try:
        ...     fieldmark.load_config("laptop", ["train.epochs=-1"])
        ... except fieldmark.FieldmarkError as error:
        ...     "train.epochs" in str(error)
        True
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive the way back from a worker process: pickle would call the constructor with the message alone."""
        return Exception.__new__, (type(self), *self.args), self.__dict__


class ConfigError(FieldmarkError):
    """A recipe or an override is not valid."""


class DataError(FieldmarkError):
    """Folders, tables or splits are not what they should be."""


class PhotoError(DataError):
    """One photo cannot be used: the file, as the user would name it, and why, in a few words without the path."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class WeightsError(FieldmarkError):
    """Weights cannot be had or do not fit the model."""


class ResourceError(FieldmarkError):
    """Not enough memory, disk or time."""


class TrainingError(FieldmarkError):
    """Training cannot go on."""


class NonFiniteError(TrainingError):
    """A loss, gradient, weight or output is not finite."""

    def __init__(self, step: int, numbers: list[int], *, what: str = "loss or gradient of") -> None:
        super().__init__(f"{what} update {step} is not finite")
        self.step = step  # 0-based
        self.numbers = numbers  # photos of its batch; [] where they are not to blame


class ReportedElsewhereError(FieldmarkError):
    """Another process of the same training, of this rank if it is known, raises the error and prints its message."""

    def __init__(self, rank: int | None) -> None:
        message = f"process {rank} of this training has failed; its own message says why"
        if rank is None:
            message = (
                "another process of this training was lost: its own message says why, or the system killed it, as when "
                "memory runs out. Go on with --resume"
            )
        super().__init__(message)
        self.rank = rank


class RunError(FieldmarkError):
    """A run folder is missing something or was made by another version."""


class PredictionError(FieldmarkError):
    """A prediction file cannot be written as asked."""


class ExportError(FieldmarkError):
    """An exported model disagrees with the run it came from, or cannot be made."""


class MissingExtraError(FieldmarkError):
    """An optional package, which an extra of `fieldmark` brings, is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. Install it with: pip install 'fieldmark[{extra}]'")


@contextmanager
def needs_extra(package: str, extra: str) -> Generator[None]:
    """Say which extra of `fieldmark` to install where an import in the block fails."""
    try:
        yield
    except ImportError:
        raise MissingExtraError(package, extra) from None


class InterruptedRunError(FieldmarkError):
    """Training was asked to stop, and did, with everything saved. Not a failure: exit code 130."""
