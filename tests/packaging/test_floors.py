"""The lowest versions that pyproject.toml declares do the journeys: floors are run, not guessed.

They are installed into a folder that comes before this environment on the path. torch and torchvision stay those that
are here, as gigabytes hang on them; what depends on torch is taken without its dependencies.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAYS = ("torch", "torchvision")
NEEDS_TORCH = ("timm", "lightning-fabric")
EXTRAS = ("serve", "sweep")
TINY = [
    *("model.name=test_resnet", "model.weights=random", "augment.size=32", "eval.size=32", "train.epochs=1"),
    *("mix.off_epochs=0", "probe.epochs=2", "schedule.warmup_epochs=0", "loader.workers=0", "train.threads=1"),
]


def floors():
    """`name==lowest` of each dependency of the core and of some extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]
    found = [re.fullmatch(r"([\w.-]+)>=([\w.]+)", line) for line in lines]
    assert all(found), lines
    return {match[1]: f"{match[1]}=={match[2]}" for match in found if match[1] not in STAYS}


@pytest.fixture(scope="module")
def lowest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("floors")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(folder)]
    wanted = floors()
    alone = [wanted.pop(name) for name in NEEDS_TORCH]
    subprocess.run([*pip, *wanted.values()], check=True)
    subprocess.run([*pip, "--no-deps", *alone], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_lowest_versions_train_judge_predict_and_serve(lowest, tmp_path, write_photos):
    write_photos(tmp_path / "photos", ("jay", "robin", "wren"))
    env = {**os.environ, "PYTHONPATH": f"{lowest}{os.pathsep}{ROOT / 'src'}", "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(*words):
        command = [sys.executable, "-m", "fieldmark", *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = "import numpy, typer; from importlib.metadata import version as v; print(numpy.__version__, v('typer'))"
    seen = subprocess.check_output([sys.executable, "-c", code], env=env, text=True).split()
    assert [f"numpy=={seen[0]}", f"typer=={seen[1]}"] == ["numpy==2.0.0", "typer==0.19.0"]
    tiny = [word for setting in TINY for word in ("--set", setting)]
    assert "Prepare" in run("--help")
    run("check", "photos", "--recipe", "laptop", *tiny)
    for seed in ("0", "1"):
        run("train", "photos", "--recipe", "laptop", "--out", f"runs/{seed}", "--seed", seed, *tiny)
    run("evaluate", "runs/0")
    run("calibrate", "runs/0", "--coverage", "0.9")
    run("compare", "runs/0", "runs/1")
    run("report", "runs", "--out", "report.html")
    run("combine", "runs/0", "runs/1", "--out", "runs/both")
    for ending in ("csv", "parquet", "json", "zip"):
        run("predict", "runs/0", "photos/jay", "--out", f"p.{ending}")
    run("preview", "runs/0/recipe.toml", "photos")
    run("sweep", "laptop", "--vary", "optim.lr=1e-3,1e-4", "--data", "photos", "--out", "sweep", *tiny)
    run("export", "runs/0", "--to", "timm", "--out", "exported")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fieldmark", "serve", "runs/0", "--port", str(port)]
    server = subprocess.Popen(command, cwd=tmp_path, env=env)
    try:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/predict",
            data=(tmp_path / "photos/jay/0.png").read_bytes(),
            headers={"Content-Type": "image/png"},
        )
        assert b'"label"' in ask(request)
    finally:
        server.terminate()
        assert server.wait(60) == 130


def ask(request):
    for _ in range(240):
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.read()
        except ConnectionError:
            time.sleep(0.5)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
            time.sleep(0.5)
    raise TimeoutError(request.full_url)
