"""Laws of the first pass over photos: inspection and cache share one decoding of each, and lose nothing by it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fieldmark.config import load_config
from fieldmark.data import inspection
from fieldmark.data.decode import DecodeSpec
from fieldmark.data.inspection import Inspection
from fieldmark.errors import PhotoError
from fieldmark.progress import Quiet
from fieldmark.runs.build import fill_cache
from fieldmark.runs.dataset import Dataset, PhotoReader, decode_spec, prepare_dataset

SIZES = ((60, 45), (900, 700), (700, 1500), (321, 640))


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of photos of all kinds, some of them broken; inspections and caches start empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number in range(8):
            exif = Image.Exif()
            exif[0x0112] = number + 1
            coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
            image = coarse.resize(SIZES[number % 4], Image.Resampling.BICUBIC)
            image.save(folder / f"{number}.jpg", exif=exif, progressive=number > 4)
        image.save(folder / "8.png")
        (folder / "cut.jpg").write_bytes((folder / "1.jpg").read_bytes()[:-400])
        (folder / "empty.jpg").touch()
    return tmp_path / "photos"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the content of each file was decoded, by any way."""
    counts: Counter[str] = Counter()

    decode = DecodeSpec.decode

    def counted(spec: DecodeSpec, source: Path | bytes, *, name: str = "", min_short_side: float | None):
        counts[str(source) if isinstance(source, Path) else name] += 1
        return decode(spec, source, name=name, min_short_side=min_short_side)

    monkeypatch.setattr(DecodeSpec, "decode", counted)
    return counts


def prepare(photos: Path, *settings: str, is_shared: bool) -> Dataset:
    config = load_config(None, [f'data.path="{photos}"', "data.broken=skip", "cache.mode=uint8", *settings])
    if is_shared:
        return prepare_dataset(config.data, progress=Quiet(), fill=lambda *a, **b: fill_cache(config, *a, **b))
    found = prepare_dataset(config.data, progress=Quiet())
    read = PhotoReader(found.index.files(), found.labels, decode_spec(config.data)).read
    cached = fill_cache(config, found.index.files(), found.sizes, read=read, progress=Quiet())
    return replace(found, cached=cached)


def test_each_photo_is_decoded_once_and_an_unchanged_one_not_again(photos: Path, decoded: Counter[str]) -> None:
    first = prepare(photos, is_shared=True)
    assert len(decoded) == 22
    assert set(decoded.values()) == {1}
    decoded.clear()
    again = prepare(photos, is_shared=True)
    assert {Path(name).name for name in decoded} == {"cut.jpg", "empty.jpg"}  # a problem is looked at again
    assert again.facts == first.facts


def test_sharing_gives_the_facts_and_pixels_of_separate_passes(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = prepare(photos, is_shared=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another user"))
    separate = prepare(photos, is_shared=False)
    assert shared.facts == separate.facts
    assert shared.broken == separate.broken
    assert len(shared.broken) == 4
    (one, told), (other, _) = shared.cached or (None, ""), separate.cached or (None, "")
    assert "18 of 22 photos" in told
    for number in range(len(shared.index.photos)):
        assert np.array_equal(one.get(number), other.get(number))


@pytest.mark.parametrize("setting", ["cache.mode=off", "cache.folder=photos/a/8.png/below"])
def test_without_a_cache_the_photos_are_inspected_all_the_same(
    photos: Path, setting: str, decoded: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    found = prepare(photos, setting, is_shared=True)
    assert found.cached is not None
    assert found.cached[0] is None
    assert len(found.facts) == 18
    assert set(decoded.values()) == {1}


def test_the_size_is_that_of_the_whole_photo_at_any_scale(photos: Path) -> None:
    for file in sorted(photos.glob("a/[0-9].*")):
        whole = DecodeSpec((0, 0, 0), 10**9).read(file)
        for least in (None, 320.0, 100.0, 1.0):
            pixels, width, height = DecodeSpec((0, 0, 0), 10**9).decode(file, min_short_side=least)
            assert (height, width) == whole.shape[:2]
            assert min(pixels.shape[:2]) >= min(least or 10**9, width, height)


def test_damage_is_the_same_at_any_scale(photos: Path) -> None:
    rng = np.random.default_rng(1)
    outcomes: Counter[str] = Counter()
    for file in sorted(photos.glob("a/[1-7].jpg")):
        for _ in range(12):
            damaged = bytearray(file.read_bytes())
            for place in rng.integers(300, len(damaged), 2):
                damaged[place] = rng.integers(256)
            found = {explain(bytes(damaged), least) for least in (None, 320.0, 1.0)}
            assert len(found) == 1
            outcomes.update(found)
    assert len(outcomes) > 1
    assert outcomes[""] < outcomes.total()


def explain(data: bytes, min_short_side: float | None) -> str:
    try:
        DecodeSpec((0, 0, 0), 10**9).read(data, min_short_side=min_short_side)
    except PhotoError as error:
        return error.reason
    return ""


def test_sizes_of_new_photos_are_estimated_from_a_sample_of_headers(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(photos.glob("a/[0-9].*"))
    decoding = DecodeSpec((0, 0, 0), 10**9)
    new = partial(Inspection, files, decoding=decoding, with_hash=False, cache_folder=None)
    with new() as inspected:
        exact = inspected.estimate_sizes()
        facts = inspected.finish(threads=2, progress=Quiet())
        assert inspected.estimate_sizes().tolist() == [[fact.width, fact.height] for fact in facts]
        assert np.array_equal(np.sort(exact), np.sort(inspected.estimate_sizes()))
    monkeypatch.setattr(inspection, "SAMPLED_HEADERS", 3)
    with new() as inspected:
        assert inspected.estimate_sizes().tolist() == exact[[0, 4, 8]].tolist() * 3
