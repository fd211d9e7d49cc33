"""Checkpoints and weights: files that are whole or absent, and loading that never runs code.

Weights are safetensors; the state of a training is a torch file of tensors, numbers and strings, read with
`weights_only`.
"""

import hashlib
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fieldmark.errors import RunError
from fieldmark.files import whole_or_absent

FORMAT = 1

Weights = Mapping[str, Tensor]


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` so that a crash or a full disk leaves the old file or the new one, never half."""
    whole_or_absent(path, lambda part: torch.save({"format": FORMAT, **content}, part))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU, or raise RunError."""
    if not path.is_file():
        raise RunError(f"{path} does not exist: there is nothing to resume")
    try:
        if _has_damaged_record(path):
            raise ValueError("its checksum does not fit what it holds")
        with warnings.catch_warnings():
            # torch warns of pickles that it did not write, before it refuses them.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = (str(error).splitlines() or ["it is empty"])[0]
        if isinstance(error, pickle.UnpicklingError):  # torch would advise to load it all the same, which can run code
            reason = "it holds more than plain values"
        raise RunError(
            f"{path} is not a checkpoint of Fieldmark, or is damaged: {reason}. Bring back a copy. Or "
            "delete it and resume: the run then starts again, to the same result"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RunError(f"{path} has another format than this version's ({FORMAT}): resume with the one that made it")
    return content


def _has_damaged_record(path: Path) -> bool:
    """Whether a torch file's records differ from the CRC-32 that torch stored with each and never checks itself."""
    damage = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError)
    with suppress(*damage), zipfile.ZipFile(path) as archive:
        return archive.testzip() is not None
    try:
        return zipfile.is_zipfile(path)  # a torn file is no archive; torch says so
    except zipfile.BadZipFile:
        return True


def save_weights(path: Path, weights: Weights) -> None:
    """Write tensors as safetensors, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    whole_or_absent(path, lambda part: save_file(tensors, part, metadata={"sha256": digest_weights(tensors)}))


def digest_weights(tensors: Weights) -> str:
    """64 hex digits of names, kinds, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_saved_weights(path: Path) -> dict[str, Tensor]:
    """Read what `save_weights` wrote, on the CPU, or raise RunError."""
    if not path.is_file():
        raise RunError(f"{path} does not exist: the run has no weights yet")
    try:
        path.open("rb").close()  # safetensors says of a forbidden file that there is none
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            stored = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{path} cannot be read: {reason}") from None
    if stored and stored != digest_weights(tensors):  # files of other programs have none
        raise RunError(f"{path} is damaged: its checksum does not fit what it holds. Bring back a copy, or train again")
    return tensors


def average_weights(members: Sequence[Weights]) -> dict[str, Tensor]:
    """Average several models' weights; integer buffers are the first member's.

    Source:
        Wortsman et al., "Model soups", arXiv:2203.05482, section 3 (uniform soup).
    """
    return {
        name: torch.stack([member[name].float() for member in members]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in members[0].items()
    }


def greedy_soup(members: Sequence[Weights], score: Callable[[Weights], float]) -> tuple[list[int], dict[str, Tensor]]:
    """Add members, best first, for as long as the average's score (larger is better) does not get worse.

    Gives the indices of the members that stayed, best first, and their average.

    Source:
        Wortsman et al., "Model soups", arXiv:2203.05482, recipe 1.
    """
    scores = [score(member) for member in members]
    order = sorted(range(len(members)), key=lambda index: -scores[index])
    kept, best = order[:1], scores[order[0]]
    for index in order[1:]:
        candidate = score(average_weights([members[number] for number in [*kept, index]]))
        if candidate >= best:
            kept, best = [*kept, index], candidate
    return kept, average_weights([members[number] for number in kept])
