"""Where a run was made: versions, hardware, command line."""

import logging
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import IO, Any

REPORTED = ("fieldmark", "torch", "torchvision", "timm", "lightning-fabric", "numpy", "pillow", "simplejpeg",
            "opencv-python-headless", "numba", "scikit-learn", "scipy", "pyarrow", "pydantic", "typer")  # fmt: skip


def describe_environment() -> dict[str, Any]:
    """Versions, hardware, command line, and the git commit of the working directory if it is in a repository."""
    commit: str | None = None
    with suppress(OSError, subprocess.SubprocessError):
        words = ["git", "rev-parse", "HEAD"]
        commit = subprocess.check_output(words, stderr=subprocess.DEVNULL, text=True, timeout=5).strip()
    versions = {"python": platform.python_version(), **package_versions()}
    return {"versions": versions, "hardware": describe_hardware(), "command": sys.argv, "git_commit": commit}


def describe_hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, and GPUs."""
    import psutil
    import torch

    return {
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": usable_cores(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gigabytes": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }


def usable_cores() -> int:
    """Return the cores of this process: by affinity, a container's quota, and OMP_NUM_THREADS, as launchers set it."""
    from joblib import cpu_count

    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if asked == "1" and processes > 1 and "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's own, which idles the rest
        return max(cpu_count() // processes, 1)
    return min(cpu_count(), int(asked)) if asked.isdecimal() and int(asked) else cpu_count()


def can_compile(device: str) -> bool:
    """Whether torch.compile finds what it builds with: a compiler, and for CUDA Triton; slim containers lack them."""
    own = [name for variable in ("CXX", "CC") for name in os.environ.get(variable, "").split()[:1]]
    has_compiler = any(map(which, [*own, "g++", "clang++", "cl"]))
    return has_compiler and (device != "cuda" or find_spec("triton") is not None)


def limit_threads(workers: int = 0) -> None:
    """Let torch compute on no more cores than this process has beside so many loader processes.

    By itself torch counts the cores of the machine, also where a container may use a few of them.
    """
    import torch

    torch.set_num_threads(max(min(torch.get_num_threads(), usable_cores() - workers), 1))


def is_main_process() -> bool:
    """Whether this process reports and writes: it is the only one, or the first of those that train together."""
    from torch import distributed

    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def start_module(
    *words: str, output: IO[bytes] | int = subprocess.DEVNULL, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Begin `python -m` with these words, in a session or a group of its own: Ctrl-C reaches this process alone."""
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=env,
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # of Windows
    )


def quiet_fabric() -> None:
    """Let Fabric say nothing on stderr but warnings: `train` reports what it chooses in its own words."""
    for name in ("lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (".*The number of training batches.*", ".*all_gather is deprecated.*"):
        warnings.filterwarnings("ignore", message=message)


def processor_name() -> str:
    """The processor's trade name, where the system knows it."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def package_versions(names: Iterable[str] = REPORTED) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    versions: dict[str, str] = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
