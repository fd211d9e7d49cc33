"""Checkpoints and weights: files that are whole or absent, and loading that never runs code.

Weights are safetensors; the state of a training is a torch file of tensors, numbers and strings, read with
`weights_only`.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fieldmark.errors import RunError
from fieldmark.files import whole_or_absent

FORMAT = 1


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
