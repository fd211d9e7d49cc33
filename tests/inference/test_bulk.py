"""Predictions in parts: each photo once, only what is missing computed, the same file as without parts."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from PIL import Image

from fieldmark.config import load_config
from fieldmark.data.shards import scan_shards
from fieldmark.data.storage import Found
from fieldmark.errors import DataError, PredictionError, RunError
from fieldmark.inference import predict as predicting
from fieldmark.inference.predict import (
    make_part,
    make_parts_on_ray,
    model_fingerprint,
    predict_in_parts,
    predict_photos,
)
from fieldmark.inference.predictor import Prediction
from fieldmark.inference.sources import open_source
from fieldmark.inference.writers import load_part, save_part
from fieldmark.progress import Quiet
from fieldmark.runs.train import train

SETTINGS = [
    *("model.name=test_resnet", "model.weights=random", "augment.size=32", "eval.size=32", "eval.batch_size=4"),
    *("train.epochs=1", "schedule.warmup_epochs=0", "probe.epochs=0", "cache.mode=off", "loader.workers=0"),
    *("train.threads=1", "train.device=cpu", "train.precision=32-true"),
]


def save_photo(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("bulk")
    for seed in range(12):
        save_photo(root / "photos" / "abc"[seed % 3] / f"{seed}.png", seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        list(train(load_config(None, [*SETTINGS, f'data.path="{root / "photos"}"']), root / "run"))
    return root / "run"


@pytest.fixture
def photos(tmp_path):
    """Eleven photos, one of them broken: three pieces of four."""
    for number in range(11):
        save_photo(tmp_path / "photos" / f"{number}.png", number)
    (tmp_path / "photos" / "5.png").write_bytes(b"broken")
    return tmp_path / "photos"


class Here:
    """Makes parts in this process; dies after some of them."""

    def __init__(self, *, dies_after=None):
        self.made = []
        self._dies_after = dies_after

    def __call__(self, task, pieces):
        for number, piece in reversed(list(pieces)):
            if len(self.made) == self._dies_after:
                raise KeyboardInterrupt
            done = make_part(task, number, piece)
            self.made.append(number)
            yield done


def predict(model, source, out, executor=None, **options):
    made = executor or Here()
    settings = {"form": "long", "flips": False, "piece_photos": 3, "progress": Quiet(), **options}
    done = predict_in_parts(model, open_source(str(source)), out, make_parts=made, **settings)
    return done, made.made


def plain(model, source, out, form="long"):
    return predict_photos(model, source, out, form=form, sample=None, sample_order=False, flips=False, progress=Quiet())


@pytest.mark.parametrize("name", ["p.csv", "p.zip", "p.json", "p.parquet"])
def test_parts_merged_are_the_file_that_one_predictor_writes(model, photos, tmp_path, name):
    expected = plain(model, photos, tmp_path / "plain" / name)
    done, made = predict(model, photos, tmp_path / name)
    assert (tmp_path / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert (done.count, [p.path for p in done.failed]) == (11, ["5.png"])
    assert [p.problem for p in done.failed] == [p.problem for p in expected.failed]
    assert made == [2, 1, 0]
    assert not (tmp_path / f"{name}.parts").exists()


def test_a_call_that_was_broken_off_goes_on_with_what_is_missing(model, photos, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        predict(model, photos, tmp_path / "p.csv", Here(dies_after=1))
    assert not (tmp_path / "p.csv").exists()
    (tmp_path / "p.csv.parts" / "part-00000001-0.parquet.part").write_bytes(b"half")
    done, made = predict(model, photos, tmp_path / "p.csv")
    assert made == [1, 0]
    assert done.count == 11
    plain(model, photos, tmp_path / "plain.csv")
    assert (tmp_path / "p.csv").read_bytes() == (tmp_path / "plain.csv").read_bytes()


def test_a_folder_keeps_its_parts_and_a_second_call_computes_nothing(model, photos, tmp_path):
    done, made = predict(model, photos, tmp_path / "out")
    assert (done.count, made) == (11, [2, 1, 0])
    parts = sorted((tmp_path / "out").glob("part-*.parquet"))
    assert [pq.read_table(path)["path"].to_pylist() for path in parts] == [
        [f"{n}.png" for n in numbers] for numbers in (range(4), range(4, 8), range(8, 11))
    ]
    again, made = predict(model, photos, tmp_path / "out")
    assert made == []
    assert (again.count, [p.path for p in again.failed]) == (11, ["5.png"])


def test_a_part_that_is_gone_is_made_again_and_one_that_is_damaged_is_named(model, photos, tmp_path):
    predict(model, photos, tmp_path / "out")
    (second,) = (tmp_path / "out").glob("part-00000001-*.parquet")
    before = pq.read_table(second)
    second.unlink()
    assert predict(model, photos, tmp_path / "out")[1] == [1]
    assert pq.read_table(second).equals(before)
    second.write_bytes(second.read_bytes()[:100])
    with pytest.raises(PredictionError, match=r"part-00000001-\w+\.parquet cannot be read: .*Remove it and go on"):
        predict(model, photos, tmp_path / "out")


def test_other_photos_another_model_and_flips_are_refused(model, photos, tmp_path):
    out = tmp_path / "out"
    predict(model, photos, out)
    with pytest.raises(PredictionError, match=r"out was begun with other photos .*another model, other --flips"):
        predict(model, photos, out, flips=True)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    recipe = (other / "recipe.toml").read_text()
    (other / "recipe.toml").write_text(recipe + "\n# changed\n")
    with pytest.raises(PredictionError, match=r"another model.*Give another --out"):
        predict(other, photos, out)
    save_photo(photos / "11.png", 11)
    with pytest.raises(PredictionError, match=r"files may have changed"):
        predict(model, photos, out)
    (photos / "11.png").unlink()
    assert predict(model, photos, out)[1] == []
    save_photo(photos / "3.png", 99)
    with pytest.raises(PredictionError, match="was begun with other photos"):
        predict(model, photos, out)


def test_a_copy_of_the_model_elsewhere_is_the_same_model(model, photos, tmp_path):
    predict(model, photos, tmp_path / "out")
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / "log.txt").write_text("other words")
    assert predict(tmp_path / "copy", photos, tmp_path / "out")[1] == []
    assert model_fingerprint(model, flips=True) != model_fingerprint(model, flips=False)


def test_a_worker_with_another_model_or_without_the_folder_says_so(model, photos, tmp_path):
    class Elsewhere(Here):
        def __call__(self, task, pieces):
            yield from (make_part(replace(task, **self.seen), *piece) for piece in pieces)

    for seen, message in (
        ({"fingerprint": "0" * 64}, r"part 0 cannot be made: .* is another model on this worker"),
        ({"folder": "/none"}, r"let all machines share the folder of --out.*What is done is kept"),
    ):
        executor = Elsewhere()
        executor.seen = seen
        with pytest.raises(DataError, match=message):
            predict(model, photos, tmp_path / "out", executor)


class Mortal:
    """Stands for Ray: one worker at a time, which dies as often as it is told."""

    exceptions = SimpleNamespace(RayError=OSError, RayTaskError=ArithmeticError)

    def __init__(self, deaths):
        self.deaths = deaths

    def cluster_resources(self):
        return {"CPU": 1.0}

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 1.0}}]

    def remote(self, **options):
        return lambda function: SimpleNamespace(remote=lambda *arguments: (function, arguments))

    def wait(self, running):
        return running[:1], running[1:]

    def get(self, work):
        if self.deaths:
            self.deaths -= 1
            raise OSError("killed")
        return work[0](*work[1])


def test_a_part_that_workers_die_of_is_given_up_and_tried_anew_by_the_next_call(model, photos, tmp_path, monkeypatch):
    def predict_with(ray):
        monkeypatch.setattr(predicting, "open_cluster", lambda _: nullcontext(ray))
        monkeypatch.setattr(predicting.torch, "set_num_threads", lambda _: None)
        options = {"form": "long", "flips": False, "piece_photos": 3, "progress": Quiet()}
        made = partial(make_parts_on_ray, address="")
        return predict_in_parts(model, open_source(str(photos)), tmp_path / "out", make_parts=made, **options)

    with pytest.raises(
        DataError, match=r"part 0 cannot be made: 4 workers crashed on this part \(killed\).*crashed.txt"
    ):
        predict_with(Mortal(deaths=4))
    named = (tmp_path / "out" / ".predict" / "crashed.txt").read_text()
    assert named == "".join(f"{number}.png\n" for number in range(4))
    assert predict_with(Mortal(deaths=3)).count == 11


def test_a_foreign_folder_is_not_written_to_and_two_calls_exclude_each_other(model, photos, tmp_path):
    with pytest.raises(PredictionError, match=r"exists and holds something else"):
        predict(model, photos, photos)
    predict(model, photos, tmp_path / "out")
    with FileLock(tmp_path / "out" / ".predict" / "lock"), pytest.raises(RunError, match=r"another predict is at work"):
        predict(model, photos, tmp_path / "out")


def test_every_kind_of_source_gives_the_same_rows_as_its_folder(model, photos, tmp_path):
    """By name: folder, list, URL, tar shards and the bytes in a Parquet table, with and without parts."""
    import fsspec
    import pyarrow as pa

    files = [photos / f"{number}.png" for number in range(11)]
    (photos.parent / "list.csv").write_text("path\n" + "".join(f"photos/{path.name}\n" for path in files))
    memory = fsspec.filesystem("memory")
    for path in files:
        memory.pipe(f"/bulk/{path.name}", path.read_bytes())
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for path in files:
            archive.add(path, path.name)
    contents = [path.read_bytes() for path in files]
    pq.write_table(pa.table({"key": [path.name for path in files], "image": contents}), tmp_path / "s.parquet")
    expected = answers(plain(model, photos, tmp_path / "folder.json").out)
    assert len(expected) == 11
    for source in ("memory://bulk", tmp_path / "list.csv", tmp_path / "s.tar", tmp_path / "s.parquet"):
        assert answers(plain(model, source, tmp_path / "plain.json").out) == expected, source
        assert answers(predict(model, source, tmp_path / "parts.json")[0].out) == expected, source


def answers(path):
    rows = json.loads(path.read_text())["predictions"]
    return [{**row, "path": row["path"].rpartition("/")[2]} for row in rows]


def test_a_link_in_a_tar_file_has_a_row_that_says_so(model, photos, tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, kind in (("c.png", tarfile.SYMTYPE), ("", b""), ("b.png", tarfile.LNKTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "a.png"
            archive.addfile(link) if name else archive.add(photos / "0.png", "a.png")
    rows = answers(plain(model, tmp_path / "s.tar", tmp_path / "p.json").out)
    assert [(row["path"], row["problem"][:21]) for row in rows] == [
        *(("c.png", "is a link to a.png, a"), ("a.png", ""), ("b.png", "is a link to a.png, a"))
    ]
    # Training reads by position, and sees all three.
    [scan] = scan_shards(str(tmp_path), [Found("s.tar", "1")])
    assert sorted(photo.name for photo in scan.photos) == ["s.tar/a.png", "s.tar/b.png", "s.tar/c.png"]
    assert len({(photo.num_bytes, photo.start) for photo in scan.photos}) == 1


def test_two_photos_of_one_name_in_different_shards_are_refused_in_the_leaderboard_form(model, tmp_path):
    content = io.BytesIO()
    Image.new("RGB", (40, 40)).save(content, "PNG")
    for number in (0, 1):
        with tarfile.open(tmp_path / f"s-{number}.tar", "w") as archive:
            info = tarfile.TarInfo("same.png")
            info.size = len(content.getvalue())
            archive.addfile(info, io.BytesIO(content.getvalue()))
    with pytest.raises(PredictionError, match=r"s-0.tar/same.png and s-1.tar/same.png would both be 'same'"):
        plain(model, f"{tmp_path}/s-*.tar", tmp_path / "p.csv", form="leaderboard")
    with pytest.raises(PredictionError, match=r"would both be 'same'"):
        predict(model, f"{tmp_path}/s-*.tar", tmp_path / "p.csv", form="leaderboard")
    assert not (tmp_path / "p.csv").exists()
    done, made = predict(model, f"{tmp_path}/s-*.tar", tmp_path / "p.csv", form="long")
    assert (done.count, made) == (2, [])  # the parts were made


def test_a_part_gives_back_names_that_are_no_text_and_probabilities_to_the_bit(tmp_path):
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    rows = np.random.default_rng(0).dirichlet(np.ones(3), size=2).astype(np.float32)
    classes = ("a", "b", "c")
    sent = [Prediction(name, classes, rows[0], "", 0.5), Prediction("b", classes, rows[1] * np.nan, "is empty", 0.5)]
    save_part(tmp_path / "p.parquet", sent, classes=classes)
    back = list(load_part(tmp_path / "p.parquet", SimpleNamespace(classes=classes, threshold=0.5, fallback=None)))
    assert [(p.path, p.problem, p.threshold) for p in back] == [(name, "", 0.5), ("b", "is empty", 0.5)]
    for one, other in zip(sent, back, strict=True):
        np.testing.assert_array_equal(one.probabilities, other.probabilities)


def test_the_photos_of_a_sample_cannot_be_reordered_where_they_are_no_folder(model, photos, tmp_path):
    (tmp_path / "sample.csv").write_text("image_name,pred_label\n")
    (tmp_path / "list.csv").write_text("path\nphotos/1.png\n")
    with pytest.raises(PredictionError, match=r"--sample-order reorders a folder of this machine.*as a list"):
        predict_photos(
            model,
            tmp_path / "list.csv",
            tmp_path / "p.csv",
            form="leaderboard",
            sample=tmp_path / "sample.csv",
            sample_order=True,
            flips=False,
            progress=Quiet(),
        )
