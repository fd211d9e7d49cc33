"""What `fieldmark doctor` looks at: this machine, what is installed, and what can be reached."""

from __future__ import annotations

import re
import shutil
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

HUB = ("huggingface.co", 443)
HUB_SECONDS = 3.0
LIBRARIES = ("torch", "torchvision", "timm", "lightning-fabric", "numpy", "numba", "pillow", "simplejpeg",
             "opencv-python-headless", "scipy", "scikit-learn", "pyarrow", "pydantic", "typer")  # fmt: skip
NOT_FOR_USERS = ("test", "bench", "docs", "all")


def examine() -> dict[str, Any]:
    """Everything, as a nested mapping for JSON. Contains no user name: paths are shown from the home folder on."""
    import platform

    import fieldmark
    from fieldmark.runs.environment import describe_hardware

    versions = {name: _version(name) for name in LIBRARIES}
    return {
        "fieldmark": fieldmark.__version__,
        "python": platform.python_version(),
        "machine": describe_hardware(),
        "versions": {name: version for name, version in versions.items() if version},
        "weights": find_weights(),
        "extras": find_extras(),
        "folders": [measure_folder(name, path) for name, path in _folders()],
        "hub_answers": hub_answers(),
    }


def find_weights() -> list[str]:
    """Pre-trained weights that need no network: in installed packages, and in the hub's cache."""
    from fieldmark.budget.candidates import find_backbones
    from fieldmark.config import Config
    from fieldmark.errors import FieldmarkError

    try:
        return [f"{found.name} ({found.weights})" for found in find_backbones(Config())]
    except FieldmarkError:
        return []


def find_extras() -> dict[str, list[str]]:
    """Extra to the packages of it that are not installed; an empty list is a complete extra."""
    missing: dict[str, list[str]] = {}
    for line in metadata.requires("fieldmark") or ():
        requirement, _, marker = line.partition(";")
        extra = re.search(r"""extra == ['"]([^'"]+)['"]""", marker)
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if not extra or not name or extra[1] in NOT_FOR_USERS:
            continue
        absent = missing.setdefault(extra[1], [])
        if name[0] != "fieldmark" and _version(name[0]) is None:
            absent.append(name[0])
    return missing


def measure_folder(name: str, path: Path) -> dict[str, Any]:
    """Size of a folder and free space of its disk, in gigabytes."""
    files = [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()] if path.is_dir() else []
    free = shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free
    used = sum(file.stat().st_size for file in files)
    shown = str(path).replace(str(Path.home()), "~", 1)
    return {"name": name, "path": shown, "gigabytes": round(used / 1e9, 2), "free_gigabytes": round(free / 1e9, 1)}


def hub_answers() -> bool:
    """Whether the model hub can be reached directly or by the proxy that the environment names."""
    import urllib.error
    import urllib.request

    if not urllib.request.getproxies():
        try:
            with socket.create_connection(HUB, timeout=HUB_SECONDS):
                return True
        except OSError:
            return False
    try:
        with urllib.request.urlopen(f"https://{HUB[0]}/", timeout=HUB_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def format_findings(found: dict[str, Any]) -> str:
    """The findings as text for people."""
    machine = found["machine"]
    extras = {name: "yes" if not absent else "missing " + ", ".join(absent) for name, absent in found["extras"].items()}
    return "\n".join(
        [
            f"fieldmark {found['fieldmark']}, Python {found['python']}, {machine['system']}",
            f"processor  {machine['processor']} ({machine['cpu_capability']}), {machine['cores']} usable cores",
            f"memory     {machine['memory_gigabytes']:g} GB",
            f"GPU        {', '.join(machine['gpus']) or 'none'}",
            f"weights    {', '.join(found['weights']) or 'none at hand: name a file by model.weights, or use the hub'}",
            f"hub        {'answers' if found['hub_answers'] else 'does not answer: weights must be at hand'}",
            *map(_format_folder, found["folders"]),
            "versions   " + ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
            "extras     " + "; ".join(f"{name}: {state}" for name, state in extras.items()),
        ]
    )


def _format_folder(folder: dict[str, Any]) -> str:
    used, free = folder["gigabytes"], folder["free_gigabytes"]
    return f"{folder['name']:10} {folder['path']}: {used:g} GB used, {free:g} GB free on the disk"


def _folders() -> list[tuple[str, Path]]:
    from fieldmark.config import Config
    from fieldmark.runs.dataset import user_folder

    cache = user_folder("cache").parent
    return [("cache", Path(Config().cache.folder or cache)), ("runs", Path.cwd() / "runs")]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
