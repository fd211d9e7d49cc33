"""Files that are damaged by a byte, a field or a cut are refused in one sentence or give the same answer.

Each file of a run folder, an export, a cache of photos and the tables that people write, thousands of times, drawn from
seeds. Files that only programs write (weights, checkpoints, predictions, caches, models) have checksums, so that they
never give another answer. JSON, TOML and CSV are for people to read and to change: what is still well formed there is
what it says, and must be answered with sane numbers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fieldmark.config import load_config
from fieldmark.data.cache import open_cache
from fieldmark.data.decode import DecodeSpec
from fieldmark.data.index import apply_corrections, load_index, load_split_table
from fieldmark.data.tables import read_csv
from fieldmark.errors import FieldmarkError
from fieldmark.export.export import export_run
from fieldmark.inference.calibration import calibrate_run, load_calibration
from fieldmark.inference.exported import ExportedModel
from fieldmark.inference.predictor import Predictor
from fieldmark.progress import Quiet
from fieldmark.runs.dataset import PhotoReader
from fieldmark.runs.folder import Run, RunResults
from fieldmark.runs.train import train
from fieldmark.training.checkpoint import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

NAMES = ("alder", "birch", "chestnut", "dogwood", "elm", "fir", "gorse", "hazel", "ivy", "juniper", "larch", "maple")
SETTINGS = (
    *("model.name=test_resnet", "model.weights=random", "augment.size=32", "eval.size=32", "train.epochs=2"),
    *("train.batch_size=8", "train.threads=1", "loader.workers=0", "schedule.warmup_epochs=0", "cache.mode=off"),
    *("probe.epochs=2", "mix.off_epochs=1", "eval.transform=squash"),
)
BINARY = ("best.safetensors", "predictions/val.parquet", "predictions/val_epochs.npz")
TEXTS = ("recipe.toml", "classes.json", "model.json", "data.json", "summary.json", "environment.json", "metrics.jsonl",
         "split.csv", "calibration.json")  # fmt: skip
OTHERS = [None, True, False, 7, -1, 0, 1e400, float("nan"), "", "x", [], [1], [[]], {}, {"a": 1}, 10**30, -0.0]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(("auk", "great, tit", "wren")):
        (root / name).mkdir()
        for place, photo in enumerate(NAMES):
            pixels = np.random.default_rng([number, place]).integers(0, 120, (40, 44, 3)).astype(np.uint8)
            pixels[..., number] += 100
            Image.fromarray(pixels).save(root / name / f"{photo}.png")
    return root


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory) -> Path:
    """A finished run with all that its folder may hold."""
    out = tmp_path_factory.mktemp("runs") / "run"
    list(train(load_config(None, [*SETTINGS, f"data.path={photos}"]), out))
    calibrate_run(Run(out), wanted="coverage", wanted_value=0.8, confidence_level=0.0, folds=5, seed=0)
    return out


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def flip_bits(data: bytes, rng: np.random.Generator, count: int) -> Iterator[bytes]:
    for place in rng.integers(len(data), size=count):
        yield data[:place] + bytes([data[place] ^ (1 << int(rng.integers(8)))]) + data[place + 1 :]


def damage(data: bytes, *, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """`count` flipped bits, and half as many each of cuts, other bytes, lost or doubled pieces and zeroed pieces."""
    rng = np.random.default_rng(seed)
    for number, changed in enumerate(flip_bits(data, rng, count)):
        yield f"bit {number}", changed
    yield "empty", b""
    for number in range(count // 2):
        start, end = sorted(rng.integers(len(data) + 1, size=2).tolist())
        short = min(end, start + int(rng.integers(1, 9)))
        yield f"cut {number}", data[:start]
        yield f"byte {number}", data[:start] + rng.bytes(1) + data[start + 1 :]
        yield f"lost {number}", data[:start] + data[short:]
        yield f"doubled {number}", data[:end] + data[start:]
        yield f"zeroed {number}", data[:start] + bytes(end - start) + data[end:]


def change_fields(content: Any) -> Iterator[Any]:
    """Each value, at any depth, as something else; each key left out; each list shorter, longer and turned around."""
    keys = list(content) if isinstance(content, dict) else range(min(len(content), 2))
    for key in keys:
        for other in OTHERS:
            yield _with(content, key, other)
        if isinstance(content, dict):
            yield {name: value for name, value in content.items() if name != key}
        if isinstance(content[key], dict | list):
            yield from (_with(content, key, inner) for inner in change_fields(content[key]))
    if isinstance(content, list) and content:
        yield from (content[1:], [*content, content[0]], content[::-1], content * 2)


def _with(content: Any, key: Any, value: Any) -> Any:
    copy = content.copy()
    copy[key] = value
    return copy


def try_all(path: Path, cases: Iterator[tuple[str, bytes]], ask: Callable[[], None]) -> tuple[int, int]:
    """Put each content in place of the file and ask; give how many were refused and how many answered."""
    whole, counts = path.read_bytes(), [0, 0]
    for name, content in cases:
        path.write_bytes(content)
        try:
            ask()
        except FieldmarkError as error:
            said = str(error)
            counts[0] += 1 if said and "Traceback" not in said else 10**9
        except BaseException as error:
            raise AssertionError(f"{path.name}, {name}: {type(error).__name__}: {error}") from error
        else:
            counts[1] += 1
    path.write_bytes(whole)
    return counts[0], counts[1]


PICTURES = [np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8) for number in range(3)]


def answer_of(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    predictor = Predictor.load(path)
    return predictor.classes, predictor.predict_proba([Image.fromarray(picture) for picture in PICTURES])


def read_all(path: Path) -> tuple[Any, ...]:
    """Everything of a run folder but its model."""
    run = Run(path)
    results = RunResults(path, split="val")
    calibration = load_calibration(run)
    split = tuple(map(astuple, run.split.photos))
    epochs = results.epoch_predictions
    return (
        *(run.config, run.classes, run.prior.tolist(), run.summary, run.environment, run.eval_spec(), run.metrics),
        *(split, results.photos, results.labels.tolist(), results.probabilities.tolist(), results.correct.tolist()),
        *(None if epochs is None else epochs.tolist(), calibration, run.decode_spec()),
    )


def require_sane(path: Path) -> None:
    classes, probabilities = answer_of(path)
    assert len(set(classes)) == probabilities.shape[1] == 3
    # A photo without an answer has no number at all, and says so.
    answered = probabilities[~np.isnan(probabilities).all(axis=1)]
    assert np.isfinite(answered).all()
    np.testing.assert_allclose(answered.sum(axis=1), 1, atol=1e-4)


@pytest.mark.parametrize("name", BINARY)
def test_a_damaged_file_that_programs_write_is_refused_or_says_the_same(run, name):
    before = read_all(run), answer_of(run)

    def ask() -> None:
        if name == "best.safetensors":
            np.testing.assert_array_equal(answer_of(run)[1], before[1][1])
        else:
            assert read_all(run) == before[0]

    refused, same = try_all(run / name, damage((run / name).read_bytes(), seed=1, count=120), ask)
    assert refused > 200, (refused, same)


def test_a_damaged_checkpoint_is_refused_or_says_the_same(run):
    before = load_checkpoint(run / "last.pt")

    def ask() -> None:
        _assert_equal(load_checkpoint(run / "last.pt"), before)

    refused, same = try_all(run / "last.pt", damage((run / "last.pt").read_bytes(), seed=2, count=100), ask)
    assert refused > 200, (refused, same)


def _assert_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            _assert_equal(first, second)
    else:
        assert one == other


@pytest.mark.parametrize("name", TEXTS)
def test_a_damaged_text_is_refused_or_means_something_sane(run, name):
    def ask() -> None:
        read_all(run)
        if name in ("classes.json", "model.json", "recipe.toml", "calibration.json"):
            require_sane(run)

    count = 60 if name == "recipe.toml" else 100
    refused, answered = try_all(run / name, damage((run / name).read_bytes(), seed=3, count=count), ask)
    assert refused > 40, (refused, answered)


@pytest.mark.parametrize("name", [name for name in TEXTS if name.endswith(".json")])
def test_no_value_of_any_key_ends_in_a_traceback_or_in_nonsense(run, name):
    content = json.loads((run / name).read_text())
    cases = ((f"field {number}", json.dumps(one).encode()) for number, one in enumerate(change_fields(content)))

    def ask() -> None:
        read_all(run)
        if name in ("classes.json", "model.json", "calibration.json"):
            require_sane(run)

    refused, answered = try_all(run / name, cases, ask)
    assert refused > 15, (refused, answered)


def test_no_value_of_an_epoch_ends_in_a_traceback(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    mutants = change_fields(json.loads(lines[0]))
    cases = (
        (f"field {number}", ("\n".join([json.dumps(one), *lines[1:]]) + "\n").encode())
        for number, one in enumerate(mutants)
    )
    refused, _ = try_all(run / "metrics.jsonl", cases, lambda: assert_tellable(run))
    assert refused > 20


def assert_tellable(run: Path) -> None:
    """A report and a comparison read the epochs too."""
    from fieldmark.study.compare import compare_runs
    from fieldmark.study.report import write_report

    _ = Run(run).metrics
    compare_runs([run], metric="top1", split="val")
    write_report([run], run.parent / "report.md", metric="top1", split="val", title="", with_photos=False)


@pytest.mark.parametrize("kind", ["torch", "onnx", "timm"])
def test_a_damaged_export_is_refused_or_gives_the_same_logits(whole, tmp_path, kind):
    out = tmp_path / "export"
    export_run(Run(whole), out, to=kind, is_int8=False, max_accuracy_loss=0.0, max_photos=6)
    images = np.random.default_rng(0).normal(0, 1, (2, 3, 32, 32)).astype(np.float32)
    before = ExportedModel.load(out, threads=1).logits(images)

    def ask_logits() -> None:
        np.testing.assert_array_equal(ExportedModel.load(out, threads=1).logits(images), before)

    def ask_sane() -> None:
        require_sane(out)

    files = [path for path in out.iterdir() if path.name not in ("fieldmark.json", "README.md")]
    assert files
    for path in files:
        refused, _ = try_all(path, damage(path.read_bytes(), seed=4, count=40), ask_logits)
        assert refused > 100
    path = out / "fieldmark.json"
    content = json.loads(path.read_text())
    del content["metrics"], content["evidence"]
    texts = ((f"field {number}", json.dumps(one).encode()) for number, one in enumerate(change_fields(content)))
    for cases in (damage(path.read_bytes(), seed=5, count=30), texts):
        refused, _ = try_all(path, cases, ask_sane)
        assert refused > 50


def test_a_damaged_stored_photo_is_the_same_photo_or_none(photos, tmp_path):
    files = sorted(photos.rglob("*.png"))[:1]
    decoding = DecodeSpec((255, 255, 255), 10**7)
    options = {"mode": "uint8", "short_side": 16, "disk_gigabytes": 1.0, "decoding": decoding, "threads": 1}
    read = PhotoReader(files, np.zeros(1, np.int64), decoding).read
    cache, _ = open_cache(files, sizes=np.full((1, 2), 40), folder=tmp_path, read=read, progress=Quiet(), **options)
    assert cache is not None
    wanted = cache.get(0)
    (stored,) = (path for path in tmp_path.rglob("uint8-*/*"))
    content, same = stored.read_bytes(), 0
    for _, damaged in damage(content, seed=6, count=300):
        stored.write_bytes(damaged)
        found = cache.select([0]).get(0)
        assert found is None or (damaged == content and np.array_equal(found, wanted))
        same += found is not None
    assert same < 10


def test_a_damaged_table_of_corrections_is_refused_or_decides_about_photos_and_classes_there_are(photos, tmp_path):
    index = load_index(photos, path_column="path", label_column="label", split_column="split", group_column=None)
    table = tmp_path / "corrections.csv"
    rows = [("auk/alder.png", "drop", ""), ("wren/elm.png", "relabel", "auk"), ("great, tit/ivy.png", "keep", "")]
    table.write_text("path,action,label\n" + "".join(f'"{path}",{action},{label}\n' for path, action, label in rows))
    known = {photo.path: photo.label for photo in index.photos}
    decided = {path: label if action == "relabel" else None for path, action, label in rows if action != "keep"}
    outcomes = set()

    def ask() -> None:
        corrected = {photo.path: photo.label for photo in apply_corrections(index, table).photos}
        changed = {path: corrected.get(path) for path in known if corrected.get(path) != known[path]}
        # Rows may be lost with their line, never turned into other decisions.
        assert changed.items() <= decided.items()
        outcomes.add(len(changed))

    # Pieces that are lost or doubled may well be another table; a byte is not.
    cases = damage(table.read_bytes(), seed=7, count=1000)
    refused, _ = try_all(table, (case for case in cases if case[0].split()[0] in ("bit", "byte", "cut")), ask)
    assert refused > 1000
    assert 2 in outcomes


@pytest.mark.parametrize("kind", ["split", "list"])
def test_a_damaged_table_is_rows_of_text_or_refused_with_its_name(photos, whole, tmp_path, kind):
    content = (whole / "split.csv").read_bytes()
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    count = content.count(b"\n")

    def ask() -> None:
        if kind == "list":
            table = read_csv("table.csv", path.read_bytes())
            assert all(len(column) == table.num_rows for column in table.values.values())
        else:
            found = load_split_table(path, photos)
            assert len(found) <= 3 * count
            assert {photo.split for photo in found.photos} <= {"train", "val", "test", ""}

    refused, answered = try_all(path, damage(content, seed=8, count=600), ask)
    assert refused > 100, (refused, answered)
    assert replace(load_split_table(path, photos)).photos == Run(whole).split.photos
