from __future__ import annotations

import errno
import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fieldmark.data import cache as cache_module
from fieldmark.data.cache import CacheReport, PhotoCache, Preset, choose_mode, open_cache, reduce_photo
from fieldmark.data.decode import DecodeSpec
from fieldmark.runs.dataset import PhotoReader

WHITE = (255, 255, 255)


class Watch:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.total, self.done, self.messages = 0, 0, list[str]()

    def start(self, total: int, done: int) -> None:
        self.total, self.done = total, done

    def advance(self, n: int) -> None:
        self.done += n

    def message(self, text: str) -> None:
        self.messages.append(text)


def make_photos(folder: Path, count: int, size: tuple[int, int] = (60, 45)) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    files = []
    for number in range(count):
        small = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        path = folder / f"{number}.jpg"
        Image.fromarray(cv2.resize(small, size, interpolation=cv2.INTER_CUBIC)).save(path, quality=95)
        files.append(path)
    return files


def opened(
    files: list[Path], folder: Path, background: tuple[int, int, int] = WHITE, **changes: Any
) -> tuple[PhotoCache | None, CacheReport]:
    arguments: dict[str, Any] = {
        "sizes": np.array([(60, 45)] * len(files)),
        "mode": "uint8",
        "short_side": 32,
        "folder": folder,
        "disk_gigabytes": 1.0,
        "decoding": DecodeSpec(background, 10**9),
        "threads": 2,
        "progress": Watch(),
    }
    arguments |= changes
    return open_cache(files, read=PhotoReader(files, np.zeros(0), arguments["decoding"]).read, **arguments)


def filled(files: list[Path], folder: Path, **changes: Any) -> PhotoCache:
    cache, _ = opened(files, folder, **changes)
    assert cache is not None
    return cache


def wait_until(is_so: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.005)
    return is_so()


def expected(file: Path, short_side: int = 32) -> np.ndarray:
    return reduce_photo(DecodeSpec(WHITE, 10**9).read(file), short_side)


def test_a_cached_photo_is_the_reduced_original(tmp_path: Path) -> None:
    files = make_photos(tmp_path / "data", 7)
    cache = filled(files, tmp_path / "cache")
    for number, file in enumerate(files):
        pixels = cache.get(number)
        assert pixels is not None
        assert pixels.shape == (32, 43, 3)
        assert pixels.flags["WRITEABLE"]
        assert np.array_equal(pixels, expected(file))


def test_a_jpeg_cache_is_close_to_the_reduced_original(tmp_path: Path) -> None:
    files = make_photos(tmp_path / "data", 4)
    cache = filled(files, tmp_path / "cache", mode="jpeg")
    for number, file in enumerate(files):
        pixels = cache.get(number)
        assert pixels is not None
        assert pixels.shape == (32, 43, 3)
        assert np.abs(pixels.astype(int) - expected(file)).mean() < 4


def test_photos_are_never_enlarged(tmp_path: Path) -> None:
    files = make_photos(tmp_path / "data", 1)
    pixels = filled(files, tmp_path / "cache", short_side=256).get(0)
    assert np.array_equal(pixels, DecodeSpec(WHITE, 10**9).read(files[0]))


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 64))
@settings(max_examples=40, deadline=None)
def test_the_short_side_is_what_was_asked_for(width: int, height: int, short_side: int) -> None:
    reduced = reduce_photo(np.zeros((height, width, 3), np.uint8), short_side)
    if min(width, height) <= short_side:
        assert reduced.shape == (height, width, 3)
    else:
        assert min(reduced.shape[:2]) == short_side
        ratio = max(width, height) / min(width, height)
        assert abs(max(reduced.shape[:2]) - short_side * ratio) <= 0.5


def test_reduction_is_as_good_as_pillows() -> None:
    picture = cv2.resize(np.random.default_rng(3).integers(0, 256, (60, 80, 3), dtype=np.uint8), (640, 480))
    reference = np.asarray(Image.fromarray(picture).resize((200, 150), Image.Resampling.BILINEAR)).astype(float)
    error = ((reduce_photo(picture, 150) - reference) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 50
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[::2] = 255
    assert np.abs(reduce_photo(stripes, 100)[1:-1].astype(int) - 127).max() <= 2  # aliasing would leave black or white


def test_a_second_run_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_photos(tmp_path / "data", 5)
    first, report = opened(files, tmp_path / "cache")
    assert (report.hits, report.photos) == (0, 5)
    monkeypatch.setattr(DecodeSpec, "decode", None)
    second, report = opened(files, tmp_path / "cache")
    assert (report.hits, report.photos, report.mode) == (5, 5, "uint8")
    assert first is not None
    assert second is not None
    assert all(np.array_equal(first.get(number), second.get(number)) for number in range(5))


def test_only_what_is_new_is_written(tmp_path: Path) -> None:
    files = make_photos(tmp_path / "data", 6)
    opened(files[:4], tmp_path / "cache")
    watch = Watch()
    _, report = opened(files, tmp_path / "cache", progress=watch)
    assert (report.hits, report.photos) == (4, 6)
    assert (watch.total, watch.done) == (6, 6)


def replace_photo(file: Path, *, mtime_ns: int | None = None) -> None:
    Image.new("RGB", (60, 45), (1, 250, 3)).save(file, quality=95)
    if mtime_ns is not None:
        os.utime(file, ns=(mtime_ns, mtime_ns))


def test_a_photo_that_changed_is_never_served(tmp_path: Path) -> None:
    files = make_photos(tmp_path / "data", 4)
    cache = filled(files, tmp_path / "cache")
    replace_photo(files[0])
    replace_photo(files[1], mtime_ns=files[1].stat().st_mtime_ns)  # another size tells
    os.utime(files[2], ns=(1, 1))
    files[3].unlink()
    assert [cache.get(number) for number in range(4)] == [None] * 4
    again = filled(files, tmp_path / "cache")
    assert np.array_equal(again.get(0), expected(files[0]))
    assert again.get(3) is None


def test_a_photo_that_changes_while_it_is_decoded_is_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_photos(tmp_path / "data", 3)
    whole = DecodeSpec.decode

    def decode_slowly(spec: DecodeSpec, file: Path, **options: Any) -> Any:
        photo = whole(spec, file, **options)
        if file == files[1]:
            replace_photo(file)
        return photo

    monkeypatch.setattr(DecodeSpec, "decode", decode_slowly)
    cache = filled(files, tmp_path / "cache")
    assert [cache.get(number) is not None for number in range(3)] == [True, False, True]


def test_settings_that_change_pixels_have_caches_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGBA", (60, 45), (0, 0, 0, 0)).save(folder / "clear.png")
    files = [folder / "clear.png"]
    values = []
    for changes in ({}, {"background": (9, 8, 7)}, {"short_side": 40}, {"mode": "jpeg"}):
        pixels = filled(files, tmp_path / "cache", **changes).get(0)
        assert pixels is not None
        values.append((pixels[0, 0].tolist(), pixels.shape[0]))
    assert values[0] == ([255, 255, 255], 32)
    assert values[1] == ([9, 8, 7], 32)
    assert values[2] == ([255, 255, 255], 40)


def test_an_older_format_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_photos(tmp_path / "data", 2)
    opened(files, tmp_path / "cache")
    monkeypatch.setattr("fieldmark.data.cache.FORMAT", cache_module.FORMAT + 1)
    _, report = opened(files, tmp_path / "cache")
    assert report.hits == 0


def test_broken_photos_are_not_cached(tmp_path: Path) -> None:
    files = make_photos(tmp_path / "data", 4)
    files[1].write_bytes(files[1].read_bytes()[:500])
    files[2].write_bytes(b"")
    cache, report = opened(files, tmp_path / "cache")
    assert cache is not None
    assert "2 of 4 photos" in str(report)
    assert [cache.get(number) is None for number in range(4)] == [False, True, True, False]


def stored_file(files: list[Path], folder: Path, number: int = 0) -> Path:
    (path,) = folder.rglob(cache_module.look_up(files[number])[0])
    return path


def test_a_damaged_photo_is_absent_and_written_again(tmp_path: Path) -> None:
    files = make_photos(tmp_path / "data", 3)
    cache = filled(files, tmp_path / "cache")
    path = stored_file(files, tmp_path / "cache", 1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert [cache.get(number) is None for number in range(3)] == [False, True, False]
    _, report = opened(files, tmp_path / "cache")
    assert (report.hits, report.photos) == (2, 3)
    assert np.array_equal(cache.get(1), expected(files[1]))


def test_a_flipped_byte_anywhere_is_noticed(tmp_path: Path) -> None:
    files = make_photos(tmp_path / "data", 1, size=(8, 6))
    opened(files, tmp_path / "cache")
    path = stored_file(files, tmp_path / "cache")
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert filled(files, tmp_path / "cache").get(0) is None
        assert np.array_equal(filled(files, tmp_path / "cache").get(0), expected(files[0]))


def test_the_checksum_is_computed_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_photos(tmp_path / "data", 2)
    cache = filled(files, tmp_path / "cache")
    cache.get(0)
    copy = pickle.loads(pickle.dumps(cache))
    monkeypatch.setattr("fieldmark.data.cache.zlib", None)
    assert cache.get(0) is not None
    assert copy.get(0) is not None  # a worker's copies, one an epoch, share what they know
    with pytest.raises(AttributeError):
        cache.get(1)


@pytest.mark.parametrize("damage", ["cut", "gone", "empty", "foreign"])
@pytest.mark.parametrize("mode", ["uint8", "jpeg"])
def test_a_photo_that_is_not_whole_is_absent_and_written_again(damage: str, mode: str, tmp_path: Path) -> None:
    files = make_photos(tmp_path / "data", 3)
    cache = filled(files, tmp_path / "cache", mode=mode)
    assert cache.get(0) is not None  # its checksum is not looked at again
    for number in (0, 1):
        path = stored_file(files, tmp_path / "cache", number)
        if damage == "cut":
            os.truncate(path, path.stat().st_size // 2)
        elif damage == "gone":
            path.unlink()
        else:
            path.write_bytes(b"" if damage == "empty" else bytes(1000))
    assert [cache.get(number) is None for number in range(3)] == [True, True, False]
    again, report = opened(files, tmp_path / "cache", mode=mode)
    assert (report.hits, report.photos) == (1, 3)
    assert again is not None
    assert all(again.get(number) is not None for number in range(3))


def test_many_threads_read_at_once(tmp_path: Path) -> None:
    files = make_photos(tmp_path / "data", 8)
    cache = filled(files, tmp_path / "cache")
    alone = [cache.get(number) for number in range(8)]
    fresh = pickle.loads(pickle.dumps(filled(files, tmp_path / "cache")))
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(fresh.get, list(range(8)) * 40))
    assert all(np.array_equal(pixels, alone[place % 8]) for place, pixels in enumerate(together))


def test_reading_does_not_grow_memory_or_open_files(tmp_path: Path) -> None:
    import psutil

    files = make_photos(tmp_path / "data", 40, size=(600, 600))
    cache = filled(files, tmp_path / "cache", sizes=np.array([(600, 600)] * 40), short_side=512)
    process = psutil.Process()
    cache.get(0)
    before, open_before = process.memory_info().rss, process.num_fds()
    for number in range(40):
        cache.get(number)
    assert process.memory_info().rss - before < 8 * 2**20  # the photos are 31 MB
    assert process.num_fds() <= open_before


SCRIPT = """
import sys, time
from pathlib import Path
import numpy as np
from fieldmark.data import cache as cache_module
from fieldmark.data.cache import open_cache
from fieldmark.data.decode import DecodeSpec

class Tell:
    def start(self, total, done): print("start", done, flush=True)
    def advance(self, n): pass
    def message(self, text): print("message", text, flush=True)

delay, folder = float(sys.argv[1]), Path(sys.argv[2])
make = cache_module.Preset.make
def slowly(self, photo):
    time.sleep(delay)
    return make(self, photo)
cache_module.Preset.make = slowly
files = sorted((folder / "data").glob("*.jpg"), key=lambda file: int(file.stem))
decoding = DecodeSpec((255, 255, 255), 10**9)
read = lambda number, min_short_side: decoding.read(files[number], min_short_side=min_short_side)
cache, report = open_cache(
    files, sizes=np.array([(60, 45)] * len(files)), mode="uint8", short_side=64, folder=folder / "cache",
    disk_gigabytes=1.0, decoding=decoding, read=read, threads=2, progress=Tell(),
)
print("report", report.hits, report.photos, report.mode, flush=True)
print("reason", report.reason, flush=True)
print("sum", sum(int(cache.get(n).sum()) for n in range(len(files)) if cache.get(n) is not None) if cache else 0)
"""


def start_script(tmp_path: Path, delay: float, **options: Any) -> subprocess.Popen[str]:
    script = tmp_path / "fill.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script), str(delay), str(tmp_path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_two_trainings_that_start_at_once_write_every_photo_once(tmp_path: Path) -> None:
    files = make_photos(tmp_path / "data", 30)
    first, second = (start_script(tmp_path, 0.01) for _ in range(2))
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    truth = f"sum {sum(int(expected(file, 64).sum()) for file in files)}"
    assert all("30 uint8" in output and truth in output for output in outputs), outputs
    assert len([path for path in (tmp_path / "cache").rglob("*/uint8-*/*") if path.is_file()]) == 30
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_second_training_says_that_it_waits(tmp_path: Path) -> None:
    files = make_photos(tmp_path / "data", 3)
    opened(files[:1], tmp_path / "cache")
    (lock_path,) = (tmp_path / "cache").rglob("writing.lock")
    watch = Watch()
    lock = FileLock(lock_path)
    lock.acquire()
    releasing = threading.Thread(target=lambda: wait_until(lambda: bool(watch.messages)) and os.close(held))
    held = lock._context.lock_file_fd  # closing it is what the end of a process does
    releasing.start()
    _, report = opened(files, tmp_path / "cache", progress=watch)
    releasing.join()
    lock._context.lock_file_fd = None
    assert watch.messages == ["cache: another process is writing it; waiting until it is done"]
    assert report.photos == 3


def test_a_lock_that_is_never_released_costs_only_the_new_photos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_photos(tmp_path / "data", 3)
    opened(files[:2], tmp_path / "cache")
    (lock_path,) = (tmp_path / "cache").rglob("writing.lock")
    monkeypatch.setattr(cache_module, "_WAIT_SECONDS", 0.05)
    with FileLock(lock_path):
        cache, report = opened(files, tmp_path / "cache")
    assert cache is not None
    assert report.photos == 2
    assert "another process has been writing it" in str(report)


def test_a_kill_while_writing_leaves_a_sound_cache_and_nothing_else(tmp_path: Path) -> None:
    files = make_photos(tmp_path / "data", 40)
    process = start_script(tmp_path, 0.02)
    folder = tmp_path / "cache"
    assert wait_until(lambda: len(list(folder.rglob("*/uint8-*/*"))) >= 6)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (place,) = folder.rglob("uint8-*")
    (place / "half.part").write_bytes(b"half")
    cache, report = opened(files, folder, short_side=64)
    assert cache is not None
    assert 6 <= report.hits < 40
    assert report.photos == 40
    assert all(np.array_equal(cache.get(number), expected(file, 64)) for number, file in enumerate(files))
    assert not list(folder.rglob("*.part"))


def test_ctrl_c_while_writing_keeps_what_is_done(tmp_path: Path) -> None:
    files = make_photos(tmp_path / "data", 12)

    class Interrupts(Watch):
        def advance(self, n: int) -> None:
            super().advance(n)
            if self.done == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(files, tmp_path / "cache", progress=Interrupts())
    _, report = opened(files, tmp_path / "cache")
    assert report.hits == 5


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))


def test_a_real_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    make_photos(tmp_path / "data", 9)
    process = start_script(tmp_path, 0, preexec_fn=limit_file_size)  # a photo takes 8,116 bytes
    output, errors = process.communicate(timeout=60)
    assert "report 0 0 off" in output, (output, errors)
    assert "reason the disk is full" in output
    assert not list((tmp_path / "cache").rglob("*/uint8-*/*"))


@pytest.mark.parametrize("at", [1, 5])
def test_a_full_disk_means_a_part_of_the_cache_or_none(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_photos(tmp_path / "data", 9)
    replace, calls = Path.replace, list[Path]()

    def replace_until_full(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_until_full)
    cache, report = opened(files, tmp_path / "cache")
    assert report.reason == "the disk is full"
    if at == 1:
        assert cache is None
        assert str(report) == "cache: off (the disk is full)"
    else:
        assert cache is not None
        assert [cache.get(number) is not None for number in range(9)] == [True] * 4 + [False] * 5
        assert "4 of 9 photos" in str(report)
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_folder_that_cannot_be_written_turns_the_cache_off(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache, report = opened(make_photos(tmp_path / "data", 1), tmp_path / "file" / "cache")
    assert cache is None
    assert "cannot be written: Not a directory" in str(report)


def test_the_budget_ends_the_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Preset, "num_bytes", lambda self, sizes: 0)  # an estimate that was far too low
    cache, report = opened(
        make_photos(tmp_path / "data", 9), tmp_path / "cache", disk_gigabytes=3.5 * 32 * 43 * 3 / 1e9
    )
    assert cache is not None
    assert report.photos == 3
    assert "is used up" in report.reason


def test_photos_that_are_gone_make_room(tmp_path: Path) -> None:
    files = make_photos(tmp_path / "data", 8)
    budget = {"disk_gigabytes": 10.5 * 32 * 43 * 3 / 1e9}
    opened(files, tmp_path / "cache", **budget)
    for file in files:
        os.utime(file, ns=(5, 5))
    _, report = opened(files, tmp_path / "cache", **budget)
    assert (report.photos, len(list((tmp_path / "cache").rglob("*/uint8-*/*")))) == (8, 8)


def test_off_is_off(tmp_path: Path) -> None:
    cache, report = opened(make_photos(tmp_path / "data", 1), tmp_path / "cache", mode="off")
    assert cache is None
    assert str(report) == "cache: off (as asked)"
    assert not (tmp_path / "cache").exists()
    assert opened([], tmp_path / "cache")[1].mode == "off"


GIGA = 10**9


@pytest.mark.parametrize(
    ("mode", "disk", "free", "memory", "expected_mode", "words"),
    [
        ("auto", 20, 100, 64, "uint8", "4.10 GB fit the disk"),
        ("auto", 4, 100, 64, "jpeg", "uint8 would take 4.10 GB, more than cache.disk_gigabytes = 4"),
        ("auto", 20, 8, 64, "jpeg", "more than half of the free disk, 4.00 GB"),
        ("auto", 20, 100, 8, "jpeg", "more than half of the memory, 4.00 GB"),
        ("auto", 0.4, 100, 64, None, "jpeg would take 0.48 GB, more than cache.disk_gigabytes = 0.4"),
        ("uint8", 20, 100, 8, "uint8", "as asked"),
        ("uint8", 4, 100, 64, None, "uint8 would take 4.10 GB"),
        ("jpeg", 20, 100, 64, "jpeg", "as asked"),
    ],
)
def test_the_mode_follows_disk_and_memory(
    mode: str,
    disk: float,
    free: float,
    memory: float,
    expected_mode: str | None,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import shutil
    from types import SimpleNamespace

    import psutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free * GIGA))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=memory * GIGA))
    sizes = np.array([(640, 480)] * 10000)  # 320 x 426.7 x 3 = 410 KB each
    candidates = [
        Preset(one, 320, DecodeSpec(WHITE, 10**9)) for one in (("uint8", "jpeg") if mode == "auto" else (mode,))
    ]
    chosen, reason = choose_mode(mode, candidates, sizes, folder=tmp_path, disk_gigabytes=disk)
    assert (chosen.mode if chosen else None) == expected_mode
    assert words in reason


def test_the_estimate_for_pixels_is_what_they_take(tmp_path: Path) -> None:
    files = make_photos(tmp_path / "data", 5)
    _, report = opened(files, tmp_path / "cache")
    assert report.bytes == sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*/uint8-*/*"))
    assert report.bytes == pytest.approx(
        Preset("uint8", 32, DecodeSpec(WHITE, 10**9)).num_bytes(np.array([(60, 45)] * 5)), rel=0.02
    )


def test_real_photos_keep_their_quality(tmp_path: Path, shared: Path) -> None:
    files = sorted((shared / "data/birds100/val").glob("*/*.jpg"))[::30]
    for mode, least in (("uint8", 99.0), ("jpeg", 33.0)):
        cache = filled(files, tmp_path / "cache", mode=mode, short_side=160, sizes=np.array([(227, 227)] * len(files)))
        for number, file in enumerate(files):
            pixels = cache.get(number)
            assert pixels is not None
            error = ((pixels.astype(float) - expected(file, 160)) ** 2).mean()
            assert 10 * np.log10(255**2 / max(error, 1e-9)) > least
