"""Files that are whole or absent, and loading that never runs code.

Weights are safetensors; the state of a training is a torch file of tensors, numbers and strings, read with
`weights_only`.
"""

from __future__ import annotations

import errno
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fieldmark.errors import ResourceError, RunError

FORMAT = 1

_DISK_SIGNS = ("PytorchStreamWriter", "I/O error", "iostream error", "unexpected pos", "os error", "Parent directory")


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` so that a crash or a full disk leaves the old file or the new one, never half.

    Raises:
        ResourceError: The disk is full or not writable; what was there before is intact.
    """
    whole_or_absent(path, lambda part: torch.save({"format": FORMAT, **content}, part))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU.

    Raises:
        RunError: No such file, not a checkpoint, or of another format.
    """
    if not path.is_file():
        raise RunError(f"{path} does not exist: there is nothing to resume")
    try:
        with warnings.catch_warnings():
            # torch warns of pickles that it did not write, before it refuses them.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = (str(error).splitlines() or ["it is empty"])[0]
        raise RunError(f"{path} is not a checkpoint of Fieldmark, or is torn: {reason}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RunError(
            f"{path} has another format than this version's ({FORMAT}): resume with the version that made it"
        )
    return content


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, whole or not at all.

    Raises:
        ResourceError: The disk is full or not writable; what was there before is intact.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    whole_or_absent(path, lambda part: save_file(tensors, part))


def load_saved_weights(path: Path) -> dict[str, Tensor]:
    """Read what `save_weights` wrote, on the CPU.

    Raises:
        RunError: No such file, or it is torn.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise RunError(f"{path} does not exist: the run has no weights yet")
    try:
        path.open("rb").close()  # safetensors says of a forbidden file that there is none
        return load_file(path)
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{path} cannot be read: {reason}") from None


def whole_or_absent(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary name beside `path`, then move the finished file into place.

    Raises:
        ResourceError: Writing failed; the temporary file is gone, and what was there before is intact.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(part)
        # safetensors makes files that only their owner may read.
        part.chmod(0o666 & ~_umask())
        # Without the sync a power cut may leave a renamed but empty file.
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except Exception as error:
        part.unlink(missing_ok=True)
        # torch and safetensors report a full disk by errors of their own.
        if isinstance(error, OSError) or any(sign in str(error) for sign in _DISK_SIGNS):
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            hint = "Free some space" if _is_full(error) else "Make the folder writable, or choose another"
            raise ResourceError(
                f"{path} could not be written: {reason}. What was there before is intact. {hint}"
            ) from error
        raise


def _is_full(error: Exception) -> bool:
    return not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT, None)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
