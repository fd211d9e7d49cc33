"""Tensors by name out of a weight file, without running any code that the file may hold."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fieldmark.errors import WeightsError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
"""File name endings that are read: the first as safetensors, the others as torch files."""

NESTS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys of training checkpoints under which the weights lie, the average first, as timm has it."""


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and text metadata of a weight file, in the file's order.

    Args:
        path: One of `SUFFIXES`.

    Returns:
        The tensors as stored, on the CPU, and the metadata of a safetensors file ({} for torch files).

    Raises:
        WeightsError: No such file, another kind of file, damaged, pickled code, or no tensors in it.
    """
    if not path.is_file():
        raise WeightsError(
            f"model.weights: there is no file or folder {str(path)!r}. Give pretrained, random, package:NAME, or "
            "the path of a .safetensors or .pth file"
        )
    if path.suffix.lower() not in SUFFIXES:
        raise WeightsError(f"model.weights: {path.name} is not a weight file; its name must end in {_list(SUFFIXES)}")
    try:
        if path.suffix.lower() == ".safetensors":
            tensors, metadata = _read_safetensors(path)
        else:
            tensors, metadata = _read_torch(path), {}
    except OSError as error:
        raise WeightsError(f"model.weights: {path.name} cannot be read: {error.strerror or error}") from None
    if not tensors:
        raise WeightsError(f"model.weights: {path.name} holds no tensors by name. Give a file of a state_dict")
    return tensors, metadata


def sha256_of(path: Path) -> str:
    """Digest of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(f"model.weights: {path.name} is not a whole safetensors file ({error})") from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickle protocols, which either load or are answered below
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"model.weights: {path.name} holds pickled objects besides tensors, which could run code when read, or "
            "it is damaged; it was not opened. Ask for the state_dict alone (torch.save(model.state_dict(), ...)) or "
            "for a .safetensors file"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"model.weights: {path.name} is not a whole torch file ({reason})") from None
    for nest in NESTS:
        inner = cast(Any, content[nest]) if isinstance(content, Mapping) and nest in content else None
        if isinstance(inner, Mapping):
            content = cast(Any, inner)
            break
    if not isinstance(content, Mapping):
        return {}
    items = cast("Mapping[Any, Any]", content).items()
    return {str(name): value for name, value in items if isinstance(value, Tensor)}


def _list(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"
