"""The container's command answers, also where nothing but a temporary folder can be written; nothing is left out.

Docker itself is not at hand where these tests run: what is asked of it is checked by reading.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def instruction(name):
    """The JSON form of an instruction's last words."""
    found = re.search(rf"^{name}\b[^\[]*(\[.*\])$", DOCKERFILE, re.MULTILINE)
    return json.loads(found[1])


def test_the_image_gets_every_file_that_it_copies_and_its_command_is_one():
    import typer.main

    from fieldmark.cli.app import app

    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    copied = {
        word for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]
    }
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)
    command = instruction("ENTRYPOINT")
    assert command[0] == "fieldmark"
    typer.main.get_command(app).commands[command[1]].make_context(command[1], command[2:])
    assert re.search(r"^USER 10001", DOCKERFILE, re.MULTILINE)


@pytest.mark.slow
def test_the_server_of_the_image_answers_its_health_check_on_a_read_only_root(tmp_path, write_photos):
    write_photos(tmp_path / "photos", ("jay", "wren"))
    tiny = ["model.name=test_resnet", "model.weights=random", "augment.size=32", "eval.size=32", "train.epochs=1"]
    tiny += ["mix.off_epochs=0", "probe.epochs=2", "schedule.warmup_epochs=0", "loader.workers=0", "train.threads=1"]
    train = ["train", "photos", "--recipe", "laptop", "--out", "run", *(w for one in tiny for w in ("--set", one))]
    subprocess.run([sys.executable, "-m", "fieldmark", *train], cwd=tmp_path, check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = dict(re.findall(r"(\w+)=(/tmp/\w+|1)", DOCKERFILE[DOCKERFILE.index("ENV PATH") :]))
    env = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "VIRTUAL_ENV") if key in os.environ}
    # /proc takes no files, whoever asks: what the image does not send to /tmp would fail there.
    env |= {key: value.replace("/tmp", str(tmp_path), 1) for key, value in given.items()} | {"HOME": "/proc"}
    words = [str(tmp_path / "run") if word == "/model" else word for word in instruction("ENTRYPOINT")[1:]]
    command = [sys.executable, "-m", "fieldmark", *words, "--port", str(port)]
    server = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    try:
        check = instruction("HEALTHCHECK")[-1].replace("8000", str(port))
        for _ in range(120):
            if subprocess.run([sys.executable, "-c", check], check=False, capture_output=True).returncode == 0:
                break
            time.sleep(0.5)
        photo = (tmp_path / "photos/jay/0.png").read_bytes()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", photo, {"Content-Type": "image/png"})
        assert json.load(urllib.request.urlopen(request, timeout=30))["photos"][0]["top"]
    finally:
        server.terminate()
        _, errors = server.communicate(timeout=60)
    assert server.returncode == 130  # ended by SIGTERM, as every verb is
    assert "Traceback" not in errors
