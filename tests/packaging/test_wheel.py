"""A wheel, installed apart from the source tree, finds its recipes, grids, templates and pages."""

from __future__ import annotations

import os
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

import numpy as np
import pytest
from PIL import Image

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


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Folder of the commands of an environment with our wheel, which borrows every other package from this one."""
    root = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(root), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = root.glob("fieldmark-*.whl")
    venv.create(root / "env", with_pip=False)
    python = root / "env/bin/python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(subprocess.check_output([str(python), "-c", code], text=True).strip())
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert any("serve/static" in name for name in zipfile.ZipFile(wheel).namelist())
    return root / "env/bin"


def run(installed: Path, folder: Path, *words: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    command = [str(installed / "fieldmark"), *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_wheel_trains_reports_and_serves(installed, tmp_path):
    rng = np.random.default_rng(0)
    for number, name in enumerate(("jay", "robin", "wren")):
        for place in range(10):
            path = tmp_path / "photos" / name / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.normal(60 + 60 * number, 40, (40, 48, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path)
    code = "import fieldmark, sys; print(fieldmark.__file__)"
    where = subprocess.check_output([str(installed / "python"), "-c", code], text=True, cwd=tmp_path, env={})
    assert str(installed.parent) in where
    assert "--out" in run(installed, tmp_path, "demo", "--help")
    assert "competition " in run(installed, tmp_path, "recipes", "list")
    tiny = [word for setting in TINY for word in ("--set", setting)]
    run(installed, tmp_path, "train", "photos", "--recipe", "laptop", "--out", "runs/one", *tiny)
    run(installed, tmp_path, "report", "runs/one", "--out", "report.html")
    assert "</html>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([str(installed / "fieldmark"), "serve", "runs/one", "--port", str(port)], cwd=tmp_path)
    try:
        assert "<html" in _page(f"http://127.0.0.1:{port}/")
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
