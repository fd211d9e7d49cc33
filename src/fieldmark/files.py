"""Paths that must exist, texts from templates, and files that are whole or absent, whatever happens meanwhile."""

import errno
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Annotated, Any, TypeVar

from filelock import FileLock, Timeout
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from fieldmark.errors import DataError, ResourceError, RunError, did_you_mean

Positive = Annotated[FiniteFloat, Field(gt=0)]
Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
_DISK_SIGNS = ("PytorchStreamWriter", "I/O error", "iostream error", "unexpected pos", "os error", "Parent directory")

Value = TypeVar("Value")


def whole_or_absent(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a name beside `path`, then move the file into place; an error leaves what was there before.

    Folders on the way are made.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with suppress(FileExistsError):  # a file in its place: opening says so better
            path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        # safetensors makes files that only their owner may read; the umask can only be read by setting it.
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        # Without the sync a power cut may leave a renamed but empty file.
        with part.open("rb+") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())
        _move(part, path)
    except BaseException as error:  # Ctrl-C too leaves nothing behind
        with suppress(OSError):  # in a folder that is not there, or is a file, there is nothing to take away either
            part.unlink()
        if failure := explain_disk_error(path, error):
            raise failure from error
        raise


def _move(part: Path, path: Path) -> None:
    """Replace a file; on Windows that is refused for the moment in which somebody reads it."""
    for _ in range(10 if sys.platform == "win32" else 0):
        with suppress(PermissionError):
            part.replace(path)
            return
        time.sleep(0.05)
    part.replace(path)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all; lone surrogates, as names that are not UTF-8 have, become bytes again."""
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    whole_or_absent(path, lambda part: part.write_bytes(data))


@contextmanager
def whole_folder(path: Path) -> Generator[Path]:
    """A folder beside `path` that takes its place if the block ends well, and is gone if it does not."""
    part: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_dead_parts(path.parent, f".{escape(path.name)}.*.part")
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=f".{os.getpid()}.part", dir=path.parent))
        yield part
        part.chmod(0o755)  # mkdtemp makes private folders
        part.rename(path)
    except Exception as error:
        if failure := explain_disk_error(path, error):
            raise failure from error
        raise
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def explain_disk_error(path: Path, error: BaseException) -> ResourceError | None:
    """Return what to raise where writing `path` failed because of the disk; None if the disk is not the reason."""
    # torch, safetensors and OpenVINO report a full disk by errors of their own.
    if not isinstance(error, OSError) and not any(sign in str(error) for sign in _DISK_SIGNS):
        return None
    reason = getattr(error, "strerror", None) or "the disk is full or failed"
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)
    hint = "Free some space" if is_full else "Make the folder writable, or choose another"
    return ResourceError(f"{path} could not be written: {reason}. What was there before is intact. {hint}")


def require_path(path: Path) -> Path:
    """Return `path`, which must exist; the DataError names what is most like it there."""
    if path.exists():
        return path
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    missing = path.absolute().relative_to(parent).parts[0]
    try:
        hint = did_you_mean(missing, os.listdir(parent))  # noqa: PTH208, names suffice
    except OSError:
        hint = ""
    raise DataError(f"{path} does not exist: there is no {missing!r} in {parent}{hint or '. Check the path'}")


def digest_file(path: Path) -> str:
    """64 hex digits: the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_folder(name: str) -> Path:
    """A folder of that name in the user's cache folder, for what can be made again."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("fieldmark", appauthor=False)) / name


@contextmanager
def exclusive_lock(
    lock: Path, *, busy: str, wait_seconds: float = 0.0, on_wait: Callable[[], None] | None = None
) -> Generator[None]:
    """Hold a lock, in a folder that is made, to the end of the block; the system takes it from a process that dies.

    Where another process goes on holding it for `wait_seconds`, `busy` is the message of the RunError.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain_disk_error(lock.parent, error) or error from None
    held = FileLock(lock, thread_local=False)
    try:
        try:
            held.acquire(timeout=0)
        except Timeout:
            if on_wait is not None:
                on_wait()
            held.acquire(timeout=wait_seconds)
    except Timeout:
        raise RunError(busy) from None
    try:
        yield
    finally:
        held.release()


def read_values(kind: type[Value], values: Any) -> Value:
    """Turn plain values, as JSON has them, into a dataclass whose fields say what they may be.

    The ValueError names the key of a value that is missing or wrong, what was expected and what was found.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        missing = sorted(".".join(map(str, one["loc"])) for one in problems if one["type"] == "missing")
        if missing:
            raise ValueError(f"lacks {', '.join(missing)}") from None
        key, found = ".".join(map(str, problems[0]["loc"])), repr(problems[0]["input"])[:80]
        raise ValueError(f"has {f'{key} = ' if key else ''}{found}: {problems[0]['msg']}") from None


def remove_dead_parts(folder: Path, pattern: str = "**/*.part") -> None:
    """Remove the unfinished files and folders that killed processes left in a folder; those of living ones stay."""
    import psutil

    for part in list(folder.glob(pattern)):
        number = part.name.split(".")[-2]
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            with suppress(OSError):
                shutil.rmtree(part) if part.is_dir() else part.unlink()


def fill_template(
    file: str, values: Mapping[str, Any], *, package: str = "fieldmark", filters: Mapping[str, Any] | None = None
) -> str:
    """Fill in a Jinja template of a folder `templates`, without a newline at its end; in HTML all values are text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader(package),
        autoescape=select_autoescape(("html",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    return environment.get_template(file).render(values).rstrip("\n")


def list_findings(file: str, values: Mapping[str, Any], *, filters: Mapping[str, Any] | None = None) -> list[str]:
    """Fill in a template of rules that give a sentence each; list the sentences."""
    return list(filter(None, fill_template(file, values, filters=filters).split("\n")))
