"""One update of a model in a process of its own, before a training that it might kill.

Some combinations of architecture, memory layout and precision crash torch on some processors, with no exception to
catch: in torch 2.14.1 the gradients of a 1x1 convolution of stride 2 on three channels in channels_last overwrite the
heap (MobileOne, RepVGG, FastViT). So what was never tried on this machine is tried where it can do no harm.
"""

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fieldmark.errors import ResourceError, TrainingError
from fieldmark.files import write_whole

TIMEOUT_SECONDS = 120.0  # a trial that takes longer says nothing, and is not remembered
SIDE = 64  # of the two images, in pixels; architectures of a fixed size get theirs
_CORRUPT = 3  # exit code of errors that a damaged heap raises


@dataclass(frozen=True)
class Computation:
    """Says how a model computes on the processor."""

    channels_last: bool  # memory layout of images and weights
    precision: str  # as in `train.precision`

    def __str__(self) -> str:
        return f"{self.precision}, {'channels_last' if self.channels_last else 'contiguous'} layout"


def choose_computation(
    model: Mapping[str, Any], wanted: Computation, *, processor: str, memory: Path
) -> tuple[Computation, str]:
    """Give the first computation that survives an update: as wanted, in the other layout, or in 32 bit as well.

    `model` are arguments of `create_classifier`. Outcomes are remembered in the folder `memory`, by processor,
    versions, model and computation. Also gives a sentence where the computation is not what was wanted, else "".
    """
    plain = replace(wanted, channels_last=False)
    for computation in dict.fromkeys((wanted, plain, replace(plain, precision="32-true"))):
        if _survives(model, computation, processor, memory):
            if computation == wanted:
                return wanted, ""
            reason = f"{model['name']} crashes torch {torch.__version__} on this processor with {wanted}"
            return computation, f"{reason}; training uses {computation} instead"
    raise TrainingError(
        f"{model['name']} crashes torch {torch.__version__} on this processor in every layout and precision. "
        "Choose another model, or another version of torch"
    )


def _survives(model: Mapping[str, Any], computation: Computation, processor: str, memory: Path) -> bool:
    import timm

    job = {"model": dict(model), "channels_last": computation.channels_last, "precision": computation.precision}
    machine = [platform.machine(), processor, torch.backends.cpu.get_cpu_capability()]
    key = json.dumps([job, machine, torch.__version__, timm.__version__], sort_keys=True)
    path = memory / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # not tried yet
        return bool(json.loads(path.read_text(encoding="utf-8"))["survived"])
    survived = try_update(job)
    if survived is not None:
        with suppress(OSError, ResourceError):  # tried again next time
            write_whole(path, json.dumps({"survived": survived, **job}))
    return survived is not False


def try_update(job: Mapping[str, Any]) -> bool | None:
    """Run one update in a process of its own; None where that says nothing (it could not start, or took too long)."""
    command = [sys.executable, "-m", "fieldmark.training.trial", json.dumps(job)]
    try:
        code = subprocess.run(command, capture_output=True, timeout=TIMEOUT_SECONDS, check=False).returncode
    except (OSError, subprocess.TimeoutExpired):
        return None
    # A signal is below 0, above 128 by way of a shell, and a large number on Windows. An exception is no crash.
    is_crash = code < 0 or code > 128 or code == _CORRUPT
    return False if is_crash else code == 0 or None


def _update(job: Mapping[str, Any]) -> None:
    from fieldmark.models.classifier import create_classifier

    torch.set_num_threads(1)
    model = create_classifier(**job["model"]).train()
    settings: Any = getattr(model.backbone, "pretrained_cfg", {})
    side = int(settings["input_size"][-1]) if settings.get("fixed_input_size") else SIDE
    images = torch.randn(2, 3, side, side)
    if job["channels_last"]:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    kind = torch.float32 if job["precision"] == "32-true" else torch.bfloat16
    with torch.autocast("cpu", kind, enabled=kind != torch.float32):
        logits = model(images)
    logits.float().square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-6).step()


if __name__ == "__main__":
    try:
        _update(json.loads(sys.argv[1]))
    except (MemoryError, SystemError):
        sys.exit(_CORRUPT)
    except Exception:  # the training itself says it better
        sys.exit(1)
