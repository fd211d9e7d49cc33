"""Laws of suggesting: what the model doubts comes first, what stands for many, and nothing that was seen before."""

from __future__ import annotations

import csv
import io
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from fieldmark.config import load_config
from fieldmark.errors import DataError, RunError
from fieldmark.inference.combine import combine
from fieldmark.inference.predictor import Predictor
from fieldmark.inference.triage import cover, rank_by_doubt, suggest
from fieldmark.progress import Progress, Quiet
from fieldmark.runs.folder import Run
from fieldmark.runs.train import train

SETTINGS = [
    *("model.name=test_resnet", "model.weights=random", "augment.size=32", "eval.size=32", "eval.batch_size=8"),
    *("train.epochs=1", "schedule.warmup_epochs=0", "cache.mode=off", "loader.workers=0", "train.threads=1"),
    *("train.device=cpu", "train.precision=32-true"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_photos) -> Run:
    root = tmp_path_factory.mktemp("suggestion")
    write_photos(root / "photos", ("a", "b", "c"), count=8, width=60)
    list(train(load_config(None, [*SETTINGS, f'data.path="{root / "photos"}"']), root / "run"))
    return Run(root / "run")


class Told(Progress):
    """Keeps the messages."""

    text = ""

    def message(self, text):
        self.text += f"{text}\n"


def make_photo(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    return Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)


@pytest.fixture
def pool(tmp_path, run):
    """Twelve photos that differ, four of them also smaller, three that have a label, and one that is broken."""
    folder = tmp_path / "pool"
    folder.mkdir()
    for seed in range(12):
        make_photo(seed).save(folder / f"{seed}.png")
    for seed in range(4):
        make_photo(seed).resize((40, 40)).save(folder / f"{seed}-small.jpg", quality=90)
    for number, file in enumerate(run.split.files()[:3]):
        shutil.copy(file, folder / f"labeled-{number}.png")
    (folder / "broken.png").write_bytes(b"no photo")
    return folder


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_photo_whose_two_likeliest_classes_differ_least_is_first():
    probabilities = np.array([[0.9, 0.1, 0.0], [0.45, 0.40, 0.15], [0.2, 0.6, 0.2], [0.5, 0.5, 0.0]])
    assert rank_by_doubt(probabilities).tolist() == [3, 1, 2, 0]


def test_each_crowd_is_stood_for_before_any_a_second_time_the_largest_first():
    rng = np.random.default_rng(0)
    crowd = np.repeat(np.arange(3), (5, 20, 10))
    features = 5 * np.eye(8)[crowd] + rng.normal(0, 0.1, (35, 8))
    chosen, stands_for = cover(features.astype(np.float32), 3)
    assert crowd[chosen].tolist() == [1, 2, 0]
    assert stands_for == [20, 10, 5]
    everything, _ = cover(features.astype(np.float32), 99)
    assert sorted(everything) == list(range(35))


def test_what_differs_is_listed_once_and_what_has_a_label_never(run, pool, tmp_path):
    told = Told()
    found = suggest(run.path, pool, tmp_path / "list.csv", count=100, progress=told)
    rows = rows_of(tmp_path / "list.csv")
    assert sorted({row["path"].removeprefix("pool/").split(".")[0].removesuffix("-small") for row in rows}) == sorted(
        map(str, range(12))
    )
    assert len(rows) == 12
    assert "is not calibrated: fieldmark calibrate" in told.text
    assert "left out, one of 1 that cannot be read: 'broken.png'" in told.text
    assert "of 19 photos 12 differ from each other and from those that have a label" in told.text
    predictor = Predictor.load(run)
    for row in rows:
        answer = predictor(tmp_path / row["path"])
        assert row["label"] == answer.label
        assert row["why"].startswith(answer.label)
    assert found == rows


def test_of_few_the_least_sure_are_chosen_and_a_second_call_says_the_same(run, pool, tmp_path):
    for name in ("one.csv", "two.csv"):
        suggest(run, pool, tmp_path / name, count=1)
    assert (tmp_path / "one.csv").read_text() == (tmp_path / "two.csv").read_text()
    suggest(run, pool, tmp_path / "elsewhere" / "three.csv", count=1)
    (row,) = rows_of(tmp_path / "elsewhere" / "three.csv")
    assert row["path"] == str(tmp_path / rows_of(tmp_path / "one.csv")[0]["path"])
    different = [file for file in pool.iterdir() if file.stem.isdigit()]
    answers = Predictor.load(run).predict_proba(different)
    doubtful = [different[number].name for number in rank_by_doubt(answers)[:5]]
    assert row["path"].rpartition("/")[2].replace("-small.jpg", ".png") in doubtful


def test_photos_of_shards_are_saved_beside_the_list(run, tmp_path):
    with tarfile.open(tmp_path / "pool.tar", "w") as archive:
        for seed in range(6):
            content = io.BytesIO()
            make_photo(seed).save(content, "PNG")
            info = tarfile.TarInfo(f"deep/{seed}.png")
            info.size = len(content.getvalue())
            archive.addfile(info, io.BytesIO(content.getvalue()))
    suggest(run, tmp_path / "pool.tar", tmp_path / "list.csv", count=2)
    rows = rows_of(tmp_path / "list.csv")
    assert len(rows) == 2
    for row in rows:
        assert row["path"].startswith("list-photos/")
        saved = np.asarray(Image.open(tmp_path / row["path"]))
        assert any(np.array_equal(saved, np.asarray(make_photo(seed))) for seed in range(6))
    assert len(list((tmp_path / "list-photos").iterdir())) == 2


def test_a_list_and_an_ensemble_are_taken_too(run, pool, tmp_path):
    shutil.copytree(run.path, tmp_path / "copy")
    ensemble = combine([run.path, tmp_path / "copy"], tmp_path / "both", progress=Quiet())
    (tmp_path / "some.csv").write_text("path\n" + "".join(f"pool/{seed}.png\n" for seed in range(3)))
    suggest(ensemble.path, tmp_path / "some.csv", tmp_path / "list.csv")
    assert sorted(row["path"] for row in rows_of(tmp_path / "list.csv")) == [f"pool/{seed}.png" for seed in range(3)]


def test_what_cannot_be_suggested_is_said(run, pool, tmp_path):
    with pytest.raises(DataError, match=r"written as CSV, and .*list.txt does not end in .csv: give another --out"):
        suggest(run, pool, tmp_path / "list.txt")
    with pytest.raises(DataError, match=r"all 24 photos of .* look the same as one that .* has learned"):
        suggest(run, run.split.root, tmp_path / "list.csv")
    with pytest.raises(DataError, match=r"none of 1 photos can be read. Give others"):
        suggest(run, pool / "broken.png", tmp_path / "list.csv")
    with pytest.raises(RunError, match="is not a run"):
        suggest(pool, pool, tmp_path / "list.csv")
    assert not (tmp_path / "list.csv").exists()
