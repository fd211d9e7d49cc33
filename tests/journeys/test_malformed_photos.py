"""Hundreds of malformed inputs in one data set go through check, train with skip, and predict.

None crashes, none is lost, none shifts a label. What single files do to the decoder is in `tests/data/test_malformed`.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fieldmark.inference.predictor import Predictor
from fieldmark.runs.folder import Run

NUM_WHOLE = 12
COLORS = {"2": (200, 60, 50), "10": (50, 170, 70), "great, tit": (60, 70, 200)}
ODD_NAMES = [
    "Ünïcödé 鳥 🐦",
    "e\u0301 decomposed",
    "quote\" and ' quote",
    "new\nline",
    "carriage\rreturn",
    "tab\t",
    "-leading-dash",
    "--set x=y",
    "two..dots.",
    "comma, semicolon; equals=",
    "{braces} [brackets]* 100%",
    "$HOME `id`",
    "back\\slash",
    "rtl \u202egpj",
    " space before and after ",
    "=HYPERLINK(1)",
    "x" * 240,
    os.fsdecode(b"not utf-8 \xff\xfe"),
]


def cases() -> list[tuple[str, bytes]]:
    """What `tests/data/test_malformed` holds the decoder against: truncations, bit flips, bombs, odd modes."""
    path = Path(__file__).parents[1] / "data" / "test_malformed.py"
    spec = importlib.util.spec_from_file_location("malformed_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CASES


def save_photo(path: Path, color: tuple[int, int, int], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).normal(color, 30, (54, 72, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def dirty(tmp_path_factory) -> Path:
    """Three classes of whole photos with plain and odd names, and all malformed files among them."""
    root = tmp_path_factory.mktemp("malformed") / "photos"
    for number, (name, color) in enumerate(COLORS.items()):
        for place in range(NUM_WHOLE):
            save_photo(root / name / f"whole {place}.png", color, 100 * number + place)
        for place, odd in enumerate(ODD_NAMES):
            save_photo(root / name / f"{odd}.png", color, 1000 * number + place)
    classes = list(COLORS)
    for place, (_, data) in enumerate(cases()):
        suffix = (".jpg", ".png", ".JPEG", ".tif", ".webp")[place % 5]  # most are wrong
        (root / classes[place % 3] / f"odd {place}{suffix}").write_bytes(data)
    for place, odd in enumerate(ODD_NAMES):
        (root / classes[place % 3] / f"broken {odd[:220]}.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a photo")
    (root / "2" / "dangling.jpg").symlink_to(root / "gone.jpg")
    return root


@pytest.fixture(scope="module")
def everything(dirty) -> set[str]:
    """Paths of all files of the data set, as they must appear everywhere."""
    return {os.fspath(path.relative_to(dirty)) for path in dirty.rglob("*") if not path.is_dir()}


@pytest.fixture(scope="module")
def broken(dirty, everything, session_fieldmark, session_settings) -> dict[str, str]:
    """What `check` says is broken: path to reason."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fieldmark.runs.check.SECONDS_MEASURED", 0.05)
        result = session_fieldmark("check", dirty, "--recipe", "laptop", "--json", *session_settings())
    assert result.code == 2, result.err
    found = json.loads(result.out)
    assert found["num_photos"] == len(everything)
    return {row["path"]: row["reason"] for row in found["broken"]}


def read_csv(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


def test_check_names_each_with_its_reason(everything, broken):
    assert len(broken) >= 150
    assert len(everything) - len(broken) >= 150
    assert set(broken) <= everything
    assert all(reason.strip() for reason in broken.values())
    assert {path for path in everything if "/broken " in path} <= set(broken)
    assert not [path for path in broken if "/odd " not in path and "/broken " not in path and "dangling" not in path]


def test_training_leaves_out_just_those_and_keeps_every_label(dirty, everything, broken, fieldmark, tiny, tmp_path):
    words = ("train", dirty, "--recipe", "laptop", "--out")
    refused = fieldmark(*words, tmp_path / "refused", *tiny())
    assert refused.code == 2
    assert f"{len(broken)} of {len(everything)} photos cannot be used" in refused.err
    done = fieldmark(*words, tmp_path / "run", *tiny("data.broken=skip"))
    assert done.code == 0, done.err
    run = Run(tmp_path / "run")
    left_out = dict(read_csv(text_of(run.path / "broken.csv"))[1:])
    assert set(left_out) == set(broken)
    assert {photo.path for photo in run.split.photos} == everything - set(broken)
    assert len(run.split.photos) == len(everything) - len(broken)
    assert all(photo.label == photo.path.split("/", 1)[0] for photo in run.split.photos)
    stored = run.predictions("val")
    assert len(stored.paths) >= 20
    assert [run.classes[number] for number in stored.labels] == [path.split("/", 1)[0] for path in stored.paths]


def test_each_has_one_row_and_the_others_keep_theirs(dirty, everything, broken, trained, fieldmark, tmp_path):
    words = ("predict", trained, dirty, "--form", "long", "--out")
    results = [fieldmark(*words, tmp_path / f"p{ending}") for ending in (".csv", ".zip", ".json", ".parquet")]
    for result in results:
        assert result.code == 2
        assert "Traceback" not in result.err
        assert f"{len(broken)} of {len(everything)} photos could not be read" in result.err
    header, *rows = read_csv(text_of(tmp_path / "p.csv"))
    path, label = header.index("path"), header.index("pred_label")
    assert len(rows) == len(everything)
    labels = {row[path]: row[label] for row in rows}
    assert set(labels) == everything
    assert {name for name in labels if not labels[name]} == set(broken)
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        assert archive.read("prediction.csv") == (tmp_path / "p.csv").read_bytes()
    answers = json.loads(text_of(tmp_path / "p.json"))["predictions"]
    assert [row["pred_label"] or "" for row in answers] == [row[label] for row in rows]
    table = pq.ParquetFile(tmp_path / "p.parquet").read()
    assert [name or "" for name in table["pred_label"].to_pylist()] == [row[label] for row in rows]


def test_each_is_answered_among_the_others_as_alone(dirty, everything, broken, trained):
    predictor = Predictor.load(trained)
    together = {answer.path: answer for answer in predictor.predict(dirty)}
    names = sorted(everything)
    assert set(together) == everything
    for name in names[:: len(names) // 25]:
        (alone,) = predictor.predict(dirty / name)
        assert (alone.label, bool(alone.problem)) == (together[name].label, name in broken)


def text_of(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "surrogateescape")
