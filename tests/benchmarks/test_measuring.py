"""The instruments themselves: photographs, child processes, peak memory, the pipelines' pictures."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import contest, memory, photos, pipelines, startup


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Photos made of the two pictures that are always there, whatever stands beside the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "PHOTOS", tmp_path_factory.mktemp("none"))
        pictures, source = photos.find_pictures(6)
    assert source == "china.jpg and flower.jpg of scikit-learn (640x427)"
    return photos.make_photos(pictures, tmp_path_factory.mktemp("photos"), count=4, shape=(320, 240, 30_000))[0]


def test_photos_have_the_size_and_the_bytes_asked_for(files):
    for file in files:
        with Image.open(file) as photo:
            assert photo.size == (320, 240)
    mean = np.mean([file.stat().st_size for file in files])
    assert 0.7 * 30_000 < mean < 1.1 * 30_000
    assert len({file.read_bytes() for file in files}) == len(files)


def test_links_are_the_same_photos_in_class_folders(files, tmp_path):
    photos.link_photos(files, tmp_path, count=10, classes=3)
    links = sorted(tmp_path.rglob("*.jpg"))
    assert len(links) == 10
    assert len({link.parent for link in links}) == 3
    assert {link.stat().st_ino for link in links} == {file.stat().st_ino for file in files}


def test_a_subset_of_the_birds_has_as_many_photos_as_asked_for(tmp_path, shared, monkeypatch):
    monkeypatch.setattr(photos, "PHOTOS", shared / "data/birds100")
    assert photos.birds_subset(tmp_path, train=30, val=4).endswith("30 of its training photos")
    assert len(list((tmp_path / "train").rglob("*.jpg"))) == 30
    assert len(list((tmp_path / "val").rglob("*.jpg"))) == 4


def test_without_the_birds_the_message_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(photos, "PHOTOS", tmp_path / "birds100")
    with pytest.raises(FileNotFoundError, match="birds100 is absent"):
        photos.birds_subset(tmp_path, train=1, val=1)


def test_ours_and_the_competition_prepare_batches_of_the_same_kind(files, tmp_path):
    theirs = pipelines.pil_torchvision()(files)
    for mode in ("off", "jpeg", "uint8"):
        ours = pipelines.Ours(files, tmp_path, mode=mode)(files)
        assert ours.shape == theirs.shape == (4, 3, 224, 224)
        assert ours.dtype == theirs.dtype
        assert abs(float(ours.mean() - theirs.mean())) < 0.5
        assert 0.5 < float(ours.std() / theirs.std()) < 2


def test_ours_draws_anew_at_each_call(files, tmp_path):
    prepare = pipelines.Ours(files, tmp_path, mode="off")
    assert not np.array_equal(prepare(files), prepare(files))


@pytest.mark.slow
@pytest.mark.parametrize("make", [pipelines.torchvision_v2, pipelines.albumentations])
@pytest.mark.filterwarnings("ignore")
def test_peers_prepare_batches_of_the_same_kind(make, files):
    if make is pipelines.albumentations:
        pytest.importorskip("albumentations", reason="slow")
    batch = make()(files)
    assert batch.shape == (4, 3, 224, 224)
    assert 0.3 < float(batch.std()) < 3


def test_peak_memory_is_that_of_the_command(tmp_path):
    small = memory.peak_mebibytes([sys.executable, "-c", "pass"], tmp_path)
    large = memory.peak_mebibytes([sys.executable, "-c", "b'x' * (100 * 2**20)"], tmp_path)
    assert 90 < large - small < 120


def test_a_command_that_fails_is_named_with_what_it_said(tmp_path):
    failing = [sys.executable, "-c", "raise SystemExit('no luck')"]
    with pytest.raises(RuntimeError, match="no luck"):
        memory.peak_mebibytes(failing, tmp_path)
    with pytest.raises(RuntimeError, match="no luck"):
        startup.seconds_of(failing, tmp_path)


def test_processor_time_is_that_of_the_work_and_not_of_the_wait(tmp_path):
    def run(code):
        return startup.processor_seconds_of(lambda: startup.seconds_of([sys.executable, "-c", code], tmp_path))

    assert run("import time; time.sleep(1)") < 0.5
    assert run("import time\nwhile time.process_time() < 0.6: pass") >= 0.55


def test_a_contender_that_dies_is_left_out_and_says_why(tmp_path):
    setup = contest.Setup("nobody", str(tmp_path), "resnet18", 32, 4)
    running, failed = contest.start_all({"nobody": setup}, tmp_path / "race")
    assert not running
    assert failed == {"nobody": "KeyError: 'nobody'"}


@pytest.mark.slow
def test_a_contender_trains_an_epoch_when_told(files, tmp_path):
    for split in ("train", "val"):
        photos.link_photos(files, tmp_path / "data" / split, count=8, classes=2)
    setups = {
        kind: contest.Setup(kind, str(tmp_path / "data"), "resnet18", 32, 4, steps=2)
        for kind in ("ours", "ours-model", "torchvision-model")
    }
    running, failed = contest.start_all(setups, tmp_path / "race")
    assert not failed
    for contender in running.values():
        pace = contender.epoch()
        contender.close()
        assert pace.by_clock > 0
        assert pace.by_processor > 0
