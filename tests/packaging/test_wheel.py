"""A wheel, installed apart from the source tree, finds its recipes, grids, templates and pages."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import tomllib
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
TINY = [
    *("model.name=test_resnet", "model.weights=random", "augment.size=32", "eval.size=32", "train.epochs=1"),
    *("mix.off_epochs=0", "probe.epochs=2", "schedule.warmup_epochs=0", "loader.workers=0", "train.threads=1"),
]


def test_extras_that_all_names_exist_and_former_names_still_install():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    (everything,) = extras["all"]
    named = everything.removeprefix("fieldmark[").removesuffix("]").split(",")
    assert set(named) <= extras.keys()
    assert {"openvino", "report"} <= extras.keys()


# The first release without the hole, the license or the fault that is known of those before it.
FLOORS = {
    "pillow": "12.3",
    "python-multipart": "0.0.30",
    "ray": "2.55",
    "jinja2": "3.1.6",
    "filelock": "3.20.3",
    "onnx": "1.19.1",
    "cleanlab": "2.8",
    "typer": "0.19",
    "imagehash": "4.3.1",
    "pyarrow": "23.0.1",
    "timm": "1.0.22",
}


def test_no_floor_admits_a_release_with_a_known_hole_or_fault():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    asked = [Requirement(text) for text in [*project["dependencies"], *(one for extra in extras for one in extra)]]
    for name, floor in FLOORS.items():
        (requirement,) = {one for one in asked if canonicalize_name(one.name) == name}
        assert requirement.specifier.contains(floor), requirement
        below = [str(bound.version) for bound in requirement.specifier if bound.operator in (">=", "==", "~=")]
        assert below, requirement
        assert max(map(Version, below)) >= Version(floor), requirement


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Folder of the commands of an environment with our wheel, which borrows every other package from this one.

    The wheel is built from a copy, since a build leaves files of older ones beside the sources and packs them again.
    """
    root = tmp_path_factory.mktemp("wheel")
    tree = root / "tree"
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip"]
    env = _environment(root)
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", root, tree], check=True, env=env)
    (wheel,) = root.glob("fieldmark-*.whl")
    venv.create(root / "env", with_pip=False)
    python = root / "env/bin/python"
    install = [*pip, "--python", python, "install", "--quiet", "--no-deps", wheel]
    subprocess.run(install, check=True, env=env)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(subprocess.check_output([python, "-c", code], text=True, env=env).strip())
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return root / "env/bin"


def run(installed: Path, folder: Path, *words: str) -> str:
    command = [str(installed / "fieldmark"), *words]
    done = subprocess.run(
        command, cwd=folder, env=_environment(folder), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _environment(folder: Path) -> dict[str, str]:
    """Return this process's environment without the source tree, and with a cache of its own."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "XDG_CACHE_HOME": str(folder / "cache")
    }


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_files_and_nothing_else(installed):
    (wheel,) = installed.parents[1].glob("fieldmark-*.whl")
    kept = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {
        file.relative_to(ROOT / "src").as_posix()
        for file in (ROOT / "src").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and ".egg-info" not in file.parent.name
    }
    assert kept == files


@pytest.mark.slow
def test_an_installed_wheel_shows_the_demo(installed, tmp_path):
    small = [word for setting in TINY for word in ("--set", setting)]
    told = run(installed, tmp_path, "demo", "--out", "demo", "--minutes", "0.3", *small)
    assert "test accuracy on 656 photos" in told
    assert (tmp_path / "demo" / "predictions.png").stat().st_size > 1000


@pytest.mark.slow
def test_an_installed_wheel_trains_reports_and_serves(installed, tmp_path, write_photos):
    write_photos(tmp_path / "photos", ("jay", "robin", "wren"))
    code = "import fieldmark, sys; print(fieldmark.__file__)"
    python = installed / "python"
    where = subprocess.check_output([python, "-c", code], text=True, cwd=tmp_path, env=_environment(tmp_path))
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert "competition " in run(installed, tmp_path, "recipes", "list")
    code = "from fieldmark.study.grid import load_grid; print(load_grid('backbones-quick').recipe)"
    grid = subprocess.check_output([python, "-c", code], text=True, cwd=tmp_path, env=_environment(tmp_path))
    assert grid.strip() == "competition"
    tiny = [word for setting in TINY for word in ("--set", setting)]
    run(installed, tmp_path, "train", "photos", "--recipe", "laptop", "--out", "runs/one", *tiny)
    run(installed, tmp_path, "report", "runs/one", "--out", "report.html")
    assert "</html>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [installed / "fieldmark", "serve", "runs/one", "--port", str(port)]
    server = subprocess.Popen(command, cwd=tmp_path, env=_environment(tmp_path))
    try:
        page = _page(f"http://127.0.0.1:{port}/")
        assert "<html" in page
        for name in re.findall(r'(?:href|src)="/?(static/[^"]+)"', page):
            assert _page(f"http://127.0.0.1:{port}/{name}")
    finally:
        server.terminate()
        server.wait(60)


def _page(address: str) -> str:
    for _ in range(120):
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return answer.read().decode()
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(address)
