"""A generated folder of three classes, and the real command line in this process."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COLORS = {"2": (200, 60, 50), "10": (50, 170, 70), "great, tit": (60, 70, 200)}
TINY = [
    *("model.name=test_resnet", "model.weights=random", "augment.size=32", "eval.size=32", "eval.transform=squash"),
    *("train.epochs=2", "mix.off_epochs=1", "optim.lr=1e-2", "optim.backbone_lr_scale=1", "probe.epochs=5"),
    *("cache.mode=off", "loader.workers=0", "train.threads=1"),
]


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


def save_photo(path: Path, color: tuple[int, int, int], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).normal(color, 30, (36, 48, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).resize((72, 54)).save(path)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "photos"
    for number, (name, color) in enumerate(COLORS.items()):
        for place in range(12):
            save_photo(root / name / f"{place}.png", color, 100 * number + place)
    return root


@pytest.fixture
def fieldmark(monkeypatch, capsys) -> Callable[..., Result]:
    """Run a command as a shell would: arguments in, exit code, stdout and stderr out."""
    from fieldmark.cli.app import main

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["fieldmark", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def session_fieldmark() -> Callable[..., Result]:
    """The same for fixtures that outlive a test, which `capsys` does not."""
    from fieldmark.cli.app import main

    def run(*arguments: object) -> Result:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", ["fieldmark", *map(str, arguments)])
            with pytest.raises(SystemExit) as exit_:
                main()
        return Result(int(exit_.value.code or 0), out.getvalue(), err.getvalue())

    return run


def settings(*more: str) -> list[str]:
    """`--set` for a model so small that a run takes a second."""
    return [word for pair in [*TINY, *more] for word in ("--set", pair)]


@pytest.fixture(scope="session")
def trained(photos, tmp_path_factory) -> Path:
    """A run folder, made once by the command line."""
    from fieldmark.cli.app import main

    out = tmp_path_factory.mktemp("runs") / "tiny"
    words = ["fieldmark", "train", str(photos), "--recipe", "laptop", "--out", str(out), *settings()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as exit_:
            main()
    assert not exit_.value.code
    return out


@pytest.fixture
def tiny() -> Callable[..., list[str]]:
    """`settings`, for tests that start runs of their own."""
    return settings


@pytest.fixture(scope="session")
def session_settings() -> Callable[..., list[str]]:
    """`settings`, for fixtures that outlive a test."""
    return settings


@pytest.fixture
def make_photo() -> Callable[[Path, tuple[int, int, int], int], None]:
    """`save_photo`: path, color, seed."""
    return save_photo
