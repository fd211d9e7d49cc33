"""Laws of inspection: every photo gets one entry in order, no file crashes it, nothing unchanged is decoded twice."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageCms

from fieldmark.data.decode import DecodeSpec
from fieldmark.data.index import Photo, PhotoIndex
from fieldmark.data.inspection import Inspection, PhotoFacts, capture_time, perceptual_hash
from fieldmark.progress import Progress, Quiet


def make_photo(path: Path, *, seed: int = 0, size: tuple[int, int] = (40, 30), exif: Image.Exif | None = None) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(
        path, exif=Image.Exif() if exif is None else exif
    )
    return path


def make_index(root: Path, *names: str) -> PhotoIndex:
    return PhotoIndex(root, tuple(Photo(name, "x", "train", "") for name in names), ("x",), {})


def inspect(
    index: PhotoIndex,
    *,
    max_pixels: int = 10**6,
    with_hash: bool = True,
    cache_folder: Path | None = None,
    threads: int = 2,
    progress: Progress = Quiet(),  # noqa: B008
) -> list[PhotoFacts]:
    decoding = DecodeSpec((255, 255, 255), max_pixels)
    with Inspection(index.files(), decoding=decoding, with_hash=with_hash, cache_folder=cache_folder) as inspection:
        return inspection.finish(threads=threads, progress=progress)


class Watch(Quiet):
    def __init__(self) -> None:
        self.done, self.seen = 0, []

    def start(self, total: int, done: int) -> None:
        self.done = done
        self.seen.append((total, done))

    def advance(self, n: int) -> None:
        self.done += n
        self.seen.append(self.done)


@pytest.fixture
def count_decodes(monkeypatch):
    names: list[str] = []
    decode = DecodeSpec.decode

    def counted(spec, source, **settings):
        names.append(Path(settings["name"]).name)
        return decode(spec, source, **settings)

    monkeypatch.setattr(DecodeSpec, "decode", counted)
    return names


def test_facts_are_of_the_upright_photo_and_of_the_bytes(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    path = make_photo(tmp_path / "a.jpg", exif=exif)
    Image.new("P", (5, 7)).save(tmp_path / "really.png", format="GIF")
    turned, wrong = inspect(make_index(tmp_path, "a.jpg", "really.png"))
    assert (turned.width, turned.height, turned.mode, turned.format, turned.problem) == (30, 40, "RGB", "JPEG", "")
    assert turned.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert turned.num_bytes == path.stat().st_size
    assert (wrong.width, wrong.height, wrong.format) == (5, 7, "GIF")


def test_each_broken_file_gets_its_reason_and_the_others_keep_their_place(tmp_path):
    whole = make_photo(tmp_path / "whole.jpg", size=(400, 300)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not a photo")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    Image.new("L", (1200, 1000)).save(tmp_path / "bomb.png")
    names = ["cut.jpg", "empty.jpg", "whole.jpg", "text.jpg", "dangling.jpg", "folder.jpg", "pipe.jpg", "bomb.png"]
    facts = inspect(make_index(tmp_path, *names, "a" * 300 + ".jpg"))
    problems = [fact.problem for fact in facts]
    assert problems[2] == ""
    assert (facts[2].width, facts[2].height) == (400, 300)
    expected = ["truncated", "empty", "", "not an image", "vanished", "not a regular file", "not a regular file"]
    for problem, part in zip(problems, [*expected, "1200000 pixels", "file name too long"], strict=True):
        assert part in problem
        assert str(tmp_path) not in problem
    assert {fact.width for fact, problem in zip(facts, problems, strict=True) if problem} == {0}


def test_permission_and_vanishing_between_look_and_read_are_reasons(tmp_path, monkeypatch):
    make_photo(tmp_path / "locked.jpg")
    make_photo(tmp_path / "gone.jpg")
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        errors = {"locked.jpg": PermissionError(13, "Permission denied"), "gone.jpg": FileNotFoundError(2, "No file")}
        if path.name in errors:
            raise errors[path.name]
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    locked, gone = inspect(make_index(tmp_path, "locked.jpg", "gone.jpg"))
    assert locked.problem == "cannot be read: permission denied"
    assert gone.problem == "has vanished"


def test_unchanged_photos_are_not_decoded_again(tmp_path, count_decodes):
    names = [f"{number}.png" for number in range(6)]
    for number, name in enumerate(names):
        make_photo(tmp_path / name, seed=number)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    index = make_index(tmp_path, *names, "broken.png")
    cache = tmp_path / "cache" / "inside"
    first = inspect(index, cache_folder=cache)
    assert sorted(count_decodes) == sorted([*names, "broken.png"])
    count_decodes.clear()
    assert inspect(index, cache_folder=cache) == first
    assert inspect(index, cache_folder=cache, with_hash=False) == first
    assert count_decodes == ["broken.png"] * 2  # a problem is looked at again
    count_decodes.clear()
    make_photo(tmp_path / "3.png", seed=99)
    again = inspect(index, cache_folder=cache)
    assert sorted(count_decodes) == ["3.png", "broken.png"]
    assert [place for place in range(7) if again[place] != first[place]] == [3]
    count_decodes.clear()
    inspect(index, cache_folder=cache, max_pixels=999_999)
    assert len(count_decodes) == 7


def test_facts_without_hashes_do_not_stand_in_for_facts_with(tmp_path, count_decodes):
    make_photo(tmp_path / "a.png")
    index = make_index(tmp_path, "a.png")
    assert inspect(index, cache_folder=tmp_path, with_hash=False)[0].perceptual_hash == ""
    assert len(inspect(index, cache_folder=tmp_path)[0].perceptual_hash) == 16
    assert len(count_decodes) == 2


def test_a_damaged_or_unusable_memory_only_forgets(tmp_path):
    make_photo(tmp_path / "a.png")
    index = make_index(tmp_path, "a.png")
    expected = inspect(index)
    assert inspect(index, cache_folder=tmp_path / "memory") == expected
    (file,) = (tmp_path / "memory").iterdir()
    for content in (b"not lines of facts at all" * 100, file.read_bytes()[:-9], file.read_bytes()[:-9] + b"\n0 [1]"):
        file.write_bytes(content)
        assert inspect(index, cache_folder=tmp_path / "memory") == expected
    assert inspect(index, cache_folder=tmp_path / "a.png" / "below a file") == expected


def test_a_line_that_was_torn_costs_no_other(tmp_path, count_decodes):
    make_photo(tmp_path / "a.png")
    make_photo(tmp_path / "b.png", seed=1)
    memory = tmp_path / "memory"
    inspect(make_index(tmp_path, "a.png"), cache_folder=memory)
    (file,) = memory.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole + whole[: len(whole) // 2])
    expected = inspect(make_index(tmp_path, "a.png", "b.png"), cache_folder=memory)
    count_decodes.clear()
    assert inspect(make_index(tmp_path, "a.png", "b.png"), cache_folder=memory) == expected
    assert count_decodes == []


def test_a_flipped_bit_in_the_memory_is_never_a_fact(tmp_path, count_decodes):
    make_photo(tmp_path / "a.png")
    index = make_index(tmp_path, "a.png")
    expected = inspect(index, cache_folder=tmp_path / "memory")
    (file,) = (tmp_path / "memory").iterdir()
    whole = file.read_bytes()
    place = whole.index(b'"width": 40') + len('"width": ')
    file.write_bytes(whole[:place] + b"5" + whole[place + 1 :])
    assert inspect(index, cache_folder=tmp_path / "memory") == expected
    assert len(count_decodes) == 2


def test_a_profile_other_than_srgb_is_named(tmp_path):
    profiles = {"srgb": ImageCms.createProfile("sRGB"), "lab": ImageCms.createProfile("LAB"), "none": None}
    for name, profile in profiles.items():
        options = {"icc_profile": ImageCms.ImageCmsProfile(profile).tobytes()} if profile else {}
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png", **options)
    Image.new("RGB", (8, 8)).save(tmp_path / "nonsense.png", icc_profile=b"no profile")
    facts = inspect(make_index(tmp_path, "srgb.png", "lab.png", "none.png", "nonsense.png"))
    assert [fact.color_profile for fact in facts] == ["", "Lab identity built-in", "", ""]


def test_an_interrupted_inspection_goes_on_where_it_was(tmp_path, count_decodes):
    names = [f"{number}.png" for number in range(8)]
    for number, name in enumerate(names):
        make_photo(tmp_path / name, seed=number)

    class Interrupts(Watch):
        def advance(self, n: int) -> None:
            super().advance(n)
            if self.done == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inspect(make_index(tmp_path, *names), cache_folder=tmp_path, progress=Interrupts(), threads=1)
    assert {"0.png", "1.png", "2.png"} <= set(count_decodes)
    inspect(make_index(tmp_path, *names), cache_folder=tmp_path)
    assert sorted(count_decodes) == names  # what threads had decoded ahead is not lost either


def test_progress_counts_to_the_number_of_photos(tmp_path):
    names = [f"{number}.png" for number in range(4)]
    for number, name in enumerate(names):
        make_photo(tmp_path / name, seed=number)
    first, second = Watch(), Watch()
    inspect(make_index(tmp_path, *names[:2]), cache_folder=tmp_path, progress=first)
    inspect(make_index(tmp_path, *names), cache_folder=tmp_path, progress=second)
    assert first.seen == [(2, 0), 1, 2]
    assert second.seen == [(4, 2), 3, 4]


def test_the_hash_survives_shrinking_and_recompression_but_tells_photos_apart(tmp_path):
    photos = [np.asarray(Image.open(make_photo(tmp_path / f"{n}.png", seed=n, size=(640, 480)))) for n in range(5)]
    hashes = [imagehash.hex_to_hash(perceptual_hash(photo)) for photo in photos]
    for photo, hashed in zip(photos, hashes, strict=True):
        Image.fromarray(photo).resize((200, 150)).save(tmp_path / "small.jpg", quality=60)
        small = imagehash.hex_to_hash(perceptual_hash(np.asarray(Image.open(tmp_path / "small.jpg"))))
        assert hashed - small <= 4
        assert hashed - imagehash.phash(Image.fromarray(photo)) <= 2
    assert min(hashes[i] - hashes[j] for i in range(5) for j in range(i)) > 12


def make_exif(tags: dict[int, str]) -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(0x8769).update(tags)
    return exif


def test_capture_time_has_subseconds_and_nonsense_is_none(tmp_path):
    exif = make_exif({0x9003: "2024:05:06 07:08:09", 0x9291: "25"})
    (fact,) = inspect(make_index(tmp_path, make_photo(tmp_path / "a.jpg", exif=exif).name))
    later = capture_time(make_exif({0x9003: "2024:05:06 07:08:10"}))
    assert later is not None
    assert later - fact.captured_at == 0.75
    assert capture_time(make_exif({0x9004: "2024:05:06 07:08:10"})) == later
    assert capture_time(make_exif({0x9003: "0000:00:00 00:00:00"})) is None
    assert capture_time(make_exif({})) is None
    assert capture_time(None) is None


def test_real_photos_are_whole(shared):
    folder = shared / "data/birds100/val"
    names = sorted(str(path.relative_to(folder)) for path in folder.glob("*/*.jpg"))[:40]
    facts = inspect(make_index(folder, *names))
    assert [fact.problem for fact in facts] == [""] * 40
    assert {(fact.width, fact.height) for fact in facts} == {(227, 227)}
    assert len({fact.sha256 for fact in facts}) == 40
