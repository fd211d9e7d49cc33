"""Photos in files, in tar files and in a store that answers late: the first batch, photos per second, and the index.

    python -m benchmarks.shards [--quick] [--json FILE]

The store is moto's stand-in for S3, in a process of its own, on this machine: each request waits for `DELAY_SECONDS`
before it is answered. An index is measured in a process of its own for each size, whose peak resident memory the system
tells; its tar files hold photos of one byte, each with its class beside it, as `fieldmark pack` writes them.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.memory import peak_mebibytes
from benchmarks.photos import SMALL, find_pictures, make_photos
from benchmarks.record import Findings, Ratio, interleave, run_benchmark

DELAY_SECONDS = 0.05
BATCH = 32
CLASSES = 4
PHOTOS_IN_A_TAR = 10_000
COLUMNS = {"path_column": "path", "label_column": "label", "split_column": "split", "group_column": None}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    photos: int
    rounds: int
    limit_seconds: float
    members: tuple[int, ...]


def make_plan(*, is_quick: bool) -> Plan:
    """The quick plan ends within 3 minutes on 2 cores."""
    if is_quick:
        return Plan(128, rounds=2, limit_seconds=60, members=(1_000, 10_000, 100_000))
    return Plan(512, rounds=3, limit_seconds=1800, members=(1_000, 10_000, 100_000, 1_000_000))


def measure(plan: Plan, folder: Path) -> Findings:
    """The same photos in four places, then indexes of four sizes."""
    from fieldmark.data.index import load_index
    from fieldmark.data.packing import pack_photos
    from fieldmark.progress import Quiet

    findings = Findings()
    pictures, source = find_pictures(60)
    files, made = make_photos(pictures, folder / "made", count=plan.photos, shape=SMALL)
    findings.notes.append(f"{made}, mosaics of {source}; the store answers {DELAY_SECONDS * 1000:.0f} ms late")
    near = folder / "photos"
    for number, file in enumerate(files):
        place = near / f"class {number % CLASSES}" / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.hardlink_to(file)
    packed = folder / "shards"
    pack_photos(load_index(near, **COLUMNS), packed, max_bytes=16e6, max_photos=None, progress=Quiet())
    with stand_in_store(folder) as put:
        places = {
            "files here": str(near),
            "tar files here": str(packed),
            "files in a store": put(near, "files"),
            "tar files in a store": put(packed, "tars"),
        }
        first = {name: partial(first_batch, place, folder) for name, place in places.items()}
        rounds = interleave(first, rounds=plan.rounds, limit_seconds=plan.limit_seconds / 2, warm_up=True)
        for name, seconds in rounds.medians.items():
            findings.add(f"first batch, {name}", seconds, "seconds to look at all photos once and prepare 32")
        cases: dict[str, Callable[[], float]] = {name: partial(read_all, place) for name, place in places.items()}
        cases["tar files in a store, one by one"] = partial(read_all, places["tar files in a store"], is_ahead=False)
        rounds = interleave(cases, rounds=plan.rounds, limit_seconds=plan.limit_seconds / 2)
        findings.add_rounds("reading", rounds, "photos per second of the clock, in batches of 32 by 2 threads")
    one_by_one = Ratio("tar files in a store", "tar files in a store, one by one")
    findings.ratios["several requests at once / one by one"] = one_by_one
    findings.ratios["tar files here / files here"] = Ratio("tar files here", "files here", 0.9)
    for members in plan.members:
        _measure_index(findings, members, folder)
    findings.notes.append("the machine was shared with other work while this was measured")
    return findings


def first_batch(place: str, folder: Path) -> float:
    """Seconds from a path to the first batch of a training that has not seen the photos before, without a cache."""
    from fieldmark.config import load_config
    from fieldmark.progress import Quiet
    from fieldmark.runs.build import build_input_config, build_reader, build_train_photos
    from fieldmark.runs.dataset import prepare_dataset

    config = load_config(
        None, [f"data.path={place}", "model.name=resnet18", "model.weights=random", "augment.size=224"]
    )
    with tempfile.TemporaryDirectory(dir=folder) as home:
        os.environ["XDG_CACHE_HOME"] = home
        began = time.perf_counter()
        dataset = prepare_dataset(config.data, progress=Quiet())
        reader = build_reader(config, dataset.index)
        prepare = build_train_photos(config, build_input_config(config), reader, dataset.sizes)
        prepare(range(BATCH), 0)
        return time.perf_counter() - began


def read_all(place: str, *, is_ahead: bool = True) -> float:
    """Photos per second that two threads decode in batches, half a batch each, as a loader without workers does."""
    from concurrent.futures import ThreadPoolExecutor

    from fieldmark.data import shards
    from fieldmark.data.decode import DecodeSpec
    from fieldmark.data.index import load_index

    files = load_index(place, **COLUMNS).files()
    decoding = DecodeSpec((0, 0, 0), 10**9)

    def read(part: list[Any]) -> None:
        if is_ahead:
            shards.fetch_ahead(part)
        for file in part:
            decoding.read(file, min_short_side=256)

    began = time.perf_counter()
    with ThreadPoolExecutor(2) as threads:
        for start in range(0, len(files), BATCH):
            batch = files[start : start + BATCH]
            list(threads.map(read, (batch[::2], batch[1::2])))
    return len(files) / (time.perf_counter() - began)


@contextmanager
def stand_in_store(folder: Path) -> Iterator[Callable[[Path, str], str]]:
    """A store that answers late; what is yielded copies a folder there and gives its URL."""
    import s3fs

    port_file = folder / "port"
    server = subprocess.Popen([sys.executable, "-c", _SERVER, str(port_file), str(DELAY_SECONDS)])
    try:
        while not port_file.is_file() or not port_file.read_text():
            time.sleep(0.05)
        os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port_file.read_text()}"
        store = s3fs.S3FileSystem()

        def put(source: Path, name: str) -> str:
            store.makedirs(f"bench-{name}", exist_ok=True)
            files = [file for file in source.rglob("*") if file.is_file()]
            store.put([str(file) for file in files], [f"bench-{name}/{file.relative_to(source)}" for file in files])
            return f"s3://bench-{name}"

        yield put
    finally:
        server.terminate()
        server.wait()


_SERVER = """
import logging, sys, time
from pathlib import Path
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
logging.getLogger("werkzeug").setLevel(logging.ERROR)
application = DomainDispatcherApplication(create_backend_app)
def late(environ, start_response):
    time.sleep(float(sys.argv[2]))
    return application(environ, start_response)
server = make_server("127.0.0.1", 0, late, threaded=True)
Path(sys.argv[1]).write_text(str(server.port))
server.serve_forever()
"""


def _measure_index(findings: Findings, members: int, folder: Path) -> None:
    place = folder / f"index-{members}"
    for start in range(0, members, PHOTOS_IN_A_TAR):
        write_small_tar(
            place / f"photos-{start // PHOTOS_IN_A_TAR:06d}.tar", start, min(members - start, PHOTOS_IN_A_TAR)
        )
    home = folder / f"home-{members}"
    code = "from benchmarks.shards import index_some; index_some({!r})"
    nothing = peak_mebibytes([sys.executable, "-c", code.format("")], home)
    for name in ("first", "again"):
        began = time.perf_counter()
        peak = peak_mebibytes([sys.executable, "-c", code.format(str(place))], home)
        findings.add(f"index {name}, {members:,} photos in tar files", time.perf_counter() - began, "seconds")
        findings.add(f"index {name}, {members:,} photos in tar files, memory", peak - nothing, "MiB, peak resident")


def index_some(place: str) -> None:
    """Index tar files, and fetch the places of their photos; nothing for "" but the imports."""
    from fieldmark.data.index import load_index

    if place:
        assert len(load_index(place, **COLUMNS).files()) > 0


def write_small_tar(path: Path, start: int, count: int) -> None:
    """Photos of one byte with their class beside them, quickly: headers are copies but for name and sum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(start, start + count):
            for extension, content in ((".jpg", b"x"), (".json", b'{"cls": "class %d"}' % (number % CLASSES))):
                info = tarfile.TarInfo(f"class {number % CLASSES}/{number:07d}{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            archive.members.clear()  # type: ignore[attr-defined]


def main() -> None:
    """Measure and report."""
    run_benchmark("shards", __doc__ or "", make_plan, measure)


if __name__ == "__main__":
    main()
