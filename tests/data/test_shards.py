"""Training from tar files, tables of photos and URLs: the photos, labels and bits that their folder gives."""

# ruff: noqa: F401, F811, fixtures of other tests

from __future__ import annotations

import http.client
import http.server
import importlib
import io
import json
import os
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.inference.test_remote import _fresh, make_tar, memory, s3
from tests.runs.test_train import TINY, assert_same_result, own_cache, photos

from fieldmark.config import load_config
from fieldmark.data import shards, storage
from fieldmark.data.decode import DecodeSpec, read_bytes
from fieldmark.data.index import load_index, load_split_table, save_split_table
from fieldmark.data.inspection import Inspection
from fieldmark.errors import DataError, PhotoError
from fieldmark.inference.evaluation import evaluate
from fieldmark.inference.sources import open_source
from fieldmark.progress import Quiet
from fieldmark.runs.dataset import prepare_dataset
from fieldmark.runs.folder import Run
from fieldmark.runs.train import resume, train

COLUMNS = {"path_column": "path", "label_column": "label", "split_column": "split", "group_column": "group"}


def members_of(folder: Path) -> dict[str, bytes]:
    """Every photo of a folder, in the order of its index."""
    index = load_index(folder, **COLUMNS)
    return {photo.path: (folder / photo.path).read_bytes() for photo in index.photos}


def cut(members: dict[str, bytes], folder: Path, *, size: int = 13) -> Path:
    """Tar files of `size` photos each."""
    items = list(members.items())
    for number, start in enumerate(range(0, len(items), size)):
        make_tar(folder / f"s-{number}.tar", dict(items[start : start + size]))
    return folder


def load(path, **columns):
    return load_index(path, **{**COLUMNS, **columns})


def rows(index):
    return [(photo.path, photo.label, photo.split, photo.group) for photo in index.photos]


def contents(index):
    return [file.read_bytes() for file in index.files()]


def test_photos_of_tars_have_the_labels_and_splits_of_the_folders_that_they_unpack_to(photos, tmp_path):
    members = members_of(photos)
    index, plain = load(cut(members, tmp_path / "shards")), load(photos)
    assert [photo.path.split("/", 1)[1] for photo in index.photos] == list(members)
    assert [row[1:] for row in rows(index)] == [row[1:] for row in rows(plain)]
    assert contents(index) == list(members.values())
    assert index.classes == plain.classes
    assert load(f"{tmp_path}/shards/s-[0-9].tar").photos == index.photos
    table = tmp_path / "split.csv"
    save_split_table(index, table)
    again = load_split_table(table, tmp_path / "shards")
    assert contents(again) == contents(index)
    assert again.fingerprint() == index.fingerprint()


def test_a_shard_is_scanned_once_until_it_changes(tmp_path, monkeypatch):
    scanned = []
    scan = shards._scan_tar
    monkeypatch.setattr(shards, "_scan_tar", lambda *given: scanned.append(given) or scan(*given))
    path = make_tar(tmp_path / "s.tar", {"a/1.jpg": b"one", "b/2.jpg": b"two"})
    load(path), load(path)
    assert len(scanned) == 1
    make_tar(path, {"a/1.jpg": b"three", "b/2.jpg": b"four"})
    assert contents(load(path)) == [b"three", b"four"]
    assert len(scanned) == 2


def test_labels_may_stand_beside_the_photos_in_the_table_or_in_a_list(tmp_path):
    noted = {"a.jpg": b"a", "a.json": json.dumps({"label": "jay", "split": "val", "group": 7}).encode(),
             "b.jpg": b"b", "b.cls": b"wren\n", "c.jpg": b"c", "c.json": b'{"label": 3}'}  # fmt: skip
    make_tar(tmp_path / "train-0.tar", noted)
    expected = [("train-0.tar/a.jpg", "jay", "val", "7"), ("train-0.tar/b.jpg", "wren", "", ""),
                ("train-0.tar/c.jpg", "3", "", "")]  # fmt: skip
    assert rows(load(tmp_path)) == expected
    (tmp_path / "list.csv").write_text("path,label,split\ntrain-0.tar/b.jpg,robin,val\ntrain-0.tar/a.jpg,jay,\n")
    listed = load(tmp_path / "list.csv")
    assert rows(listed) == [("train-0.tar/a.jpg", "jay", "", ""), ("train-0.tar/b.jpg", "robin", "val", "")]
    assert contents(listed) == [b"a", b"b"]


def test_what_cannot_be_read_one_by_one_or_has_no_label_is_one_sentence(tmp_path):
    make_tar(tmp_path / "a" / "s.tar.gz", {"a/1.jpg": b""}, mode="w:gz")
    for path in (tmp_path / "a", tmp_path / "a" / "s.tar.gz"):
        with pytest.raises(DataError, match=r"s.tar.gz is packed, so no photo can be read by itself. Give it as"):
            load(path)
    make_tar(tmp_path / "b" / "s.tar", {"1.jpg": b"", "2.jpg": b"", "2.cls": b"jay"})
    with pytest.raises(DataError, match=r"1 of 2 photos in shards have no label, such as 's.tar/1.jpg'. Put a .cls"):
        load(tmp_path / "b")
    make_tar(tmp_path / "c" / "s.tar", {"1.jpg": b"", "2.jpg": b""})
    with pytest.raises(DataError, match=r"no class folders, only photos"):
        load(tmp_path / "c")


def test_what_a_damaged_shard_lost_is_named_and_no_label_moves(photos, tmp_path):
    members = members_of(photos)
    folder = cut(members, tmp_path / "shards")
    whole = (folder / "s-1.tar").read_bytes()
    (folder / "s-1.tar").write_bytes(whole[: len(whole) // 2])
    index = load(folder)
    lost = len(members) - len(index.photos)
    assert 3 < lost < 12
    assert [path for path, _ in index.damaged] == ["s-1.tar"]
    assert "photos behind that are lost" in index.damaged[0][1]
    config = load_config(None, [f"data.path={folder}"]).data
    with pytest.raises(DataError, match=r"'s-1.tar' is damaged after '.*': unexpected end of data"):
        prepare_dataset(config, progress=Quiet())
    found = prepare_dataset(config.model_copy(update={"broken": "skip"}), progress=Quiet())
    assert found.broken[0][0] == "s-1.tar"
    for photo, file in zip(found.index.photos, found.index.files(), strict=True):
        inner = photo.path.split("/", 1)[1]
        assert photo.label == inner.split("/")[1]
        assert file.read_bytes() == members[inner]
    (folder / "s-0.tar").unlink()
    gone = load_split_table(_saved(index, tmp_path), folder).files()
    with pytest.raises(PhotoError, match=r"s-0.tar/train/2/0.png: has vanished"):
        read_bytes(gone[0])


def _saved(index, folder: Path) -> Path:
    save_split_table(index, folder / "split.csv")
    return folder / "split.csv"


def settings(path, *more):
    return load_config(None, [f"data.path={path}", *TINY, *more])


def test_training_from_shards_gives_the_bits_of_training_from_the_folder(photos, tmp_path, monkeypatch):
    """With workers and without, with the cache and without, interrupted and resumed."""
    members = members_of(photos)
    list(train(settings(photos), tmp_path / "plain"))
    folder = cut(members, tmp_path / "shards")
    list(train(settings(folder, "loader.workers=2", "cache.mode=off"), tmp_path / "tars"))
    for _ in train(settings(folder), tmp_path / "halves"):
        break
    list(resume(tmp_path / "halves"))
    for name in ("tars", "halves"):
        assert_same_result(tmp_path / "plain", tmp_path / name)
    run = Run(tmp_path / "tars")
    assert evaluate(run).metrics["top1"] == evaluate(Run(tmp_path / "plain")).metrics["top1"]


def upload(bucket, folder: Path, place: str) -> str:
    """Every file of a folder into the stand-in store; gives its URL."""
    bucket.makedirs(place.split("/")[0], exist_ok=True)
    for file in folder.rglob("*"):
        if file.is_file():
            bucket.pipe(f"{place}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    return f"s3://{place}"


def test_training_from_an_object_store_gives_the_bits_of_the_folder_and_later_epochs_do_not_ask_it(
    photos, tmp_path, s3, monkeypatch
):
    bucket = s3()
    list(train(settings(photos), tmp_path / "plain"))
    cut(members_of(photos), tmp_path / "shards")
    url = upload(bucket, tmp_path / "shards", "train-bucket/shards")
    asked = []
    fetch = shards.fetch
    monkeypatch.setattr(shards, "fetch", lambda *given: asked.append(given) or fetch(*given))
    list(train(settings(url), tmp_path / "far"))
    assert_same_result(tmp_path / "plain", tmp_path / "far")
    times = Counter(given[:2] for given in asked)
    learned = Run(tmp_path / "far").split.of("train").files()
    assert {times[file.location, file.start] for file in learned} <= {1, 2}  # one for the size in its header
    assert evaluate(Run(tmp_path / "far")).metrics["top1"] == evaluate(Run(tmp_path / "plain")).metrics["top1"]
    bucket.rm("train-bucket/shards/s-0.tar")
    with pytest.raises(PhotoError, match=r"s-0.tar/train/2/0.png: has vanished"):
        read_bytes(Run(tmp_path / "far").split.files()[0])
    s3.server.stop()
    with pytest.raises(DataError, match=r"cannot be reached"):
        list(train(settings(url), tmp_path / "gone"))


def write_table(folder: Path, path: Path, *, names: bool = True, struct: bool = True, **options) -> Path:
    """The photos of a folder as a Parquet table with their contents, as Hugging Face writes it."""
    index = load(folder)
    data = [file.read_bytes() for file in index.files()]
    columns = {
        "image": [{"bytes": one, "path": None} for one in data] if struct else data,
        "label": [photo.label for photo in index.photos],
        "split": [photo.split for photo in index.photos],
    }
    columns |= {"path": [photo.path for photo in index.photos]} if names else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=7, **options)
    return path


@pytest.mark.parametrize("names", [True, False])
def test_training_from_a_table_of_photos_gives_the_bits_of_the_folder(photos, tmp_path, names):
    table = write_table(photos, tmp_path / "t" / "t.parquet", names=names, struct=names)
    index, plain = load(table.parent), load(photos)
    assert [row[1:] for row in rows(index)] == [row[1:] for row in rows(plain)]
    assert contents(index) == contents(plain)
    again = load_split_table(_saved(index, tmp_path), index.root)
    assert again.files() == index.files()
    assert list(open_source(str(table)).names()) == [photo.path for photo in index.photos]
    list(train(settings(photos, "train.epochs=1"), tmp_path / "plain"))
    list(train(settings(table, "train.epochs=1", "cache.mode=off", "loader.workers=2"), tmp_path / "table"))
    assert_same_result(tmp_path / "plain", tmp_path / "table")


def test_tables_of_hugging_face_have_names_of_classes_apart_and_splits_in_their_own_names(tmp_path):
    feature = {"info": {"features": {"label": {"names": ["jay", "wren"], "_type": "ClassLabel"}}}}
    for name, labels in (("train-00000-of-00001", [1, 0]), ("validation-00000-of-00001", [0, None])):
        table = pa.table({"image": [{"bytes": b"x", "path": "a.jpg"}] * 2, "label": labels})
        table = table.replace_schema_metadata({"huggingface": json.dumps(feature)})
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data" / f"{name}.parquet")
    with pytest.raises(DataError, match=r"1 of 4 photos in shards have no label"):
        load(tmp_path / "data")
    found = load(f"{tmp_path}/data/train-*.parquet")
    assert rows(found) == [
        ("train-00000-of-00001.parquet/0", "wren", "train", ""),
        ("train-00000-of-00001.parquet/1", "jay", "train", ""),
    ]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("train-00000-of-00002-a09b74b3ef9c3b56.tar", "test-00000-of-00001-09ab74b3ef9c3b56.tar"),
        ("train/0000.tar", "test/0000.tar"),
        ("train-000000.tar", "test-000000.tar"),
        ("train.tar", "test.tar"),
    ],
)
def test_shards_named_by_their_splits_keep_them_and_photos_beside_are_counted(first, second, tmp_path):
    photo = {"a.jpg": b"x", "a.cls": b"jay"}
    for name in (first, second):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make_tar(tmp_path / name, photo)
    assert {row[2] for row in rows(load(tmp_path))} == {"train", "test"}
    (tmp_path / second).unlink()
    assert {row[2] for row in rows(load(tmp_path))} == {""}  # of one name: no division
    (tmp_path / "new.jpg").write_bytes(b"x")
    assert load(f"{tmp_path}/**").ignored == {"photo beside the shards": 1}


def test_what_is_wrong_with_a_table_of_photos_is_one_sentence(photos, tmp_path):
    pq.write_table(pa.table({"image": ["a"], "label": ["b"]}), tmp_path / "none.parquet")
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        pq.write_table(pa.table({"label": ["b"]}), tmp_path / "two" / f"{name}.parquet")
    with pytest.raises(DataError, match=r"a.parquet holds no photos: none of its columns image, .* holds bytes"):
        load(tmp_path / "two")
    table = write_table(photos, tmp_path / "t.parquet")
    index = load(table)
    damaged = bytearray(table.read_bytes())
    damaged[4:3000] = b"\xff" * 2996
    table.write_bytes(damaged)
    with pytest.raises(PhotoError, match=r"t.parquet/train/2/0.png: cannot be had: .*t.parquet is damaged"):
        read_bytes(index.files()[0])


def test_photos_lists_and_tables_in_a_store_train_as_the_folder(photos, tmp_path, s3):
    """With relative paths and URLs, in a list there and one here; a photo that is gone is named and skipped."""
    bucket = s3()
    far = upload(bucket, photos, "list-bucket/photos")
    index = load(photos)
    lines = [f"{photo.path},{photo.label},{photo.split}" for photo in index.photos]
    bucket.pipe("list-bucket/photos/list.csv", "\n".join(["path,label,split", *lines]).encode())
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *(f"{far}/{line}" for line in lines)]))
    bucket.put(str(write_table(photos, tmp_path / "t.parquet")), "list-bucket/tables/t.parquet")
    list(train(settings(photos, "train.epochs=1"), tmp_path / "plain"))
    places = {
        "folder": far,
        "far": f"{far}/list.csv",
        "near": tmp_path / "list.csv",
        "table": "s3://list-bucket/tables",
    }
    for name, place in places.items():
        found = load(place)
        assert [row[1:] for row in rows(found)] == [row[1:] for row in rows(index)], name
        assert contents(found) == contents(index)
        again = load_split_table(_saved(found, tmp_path), found.root)
        assert again.fingerprint() == found.fingerprint()
    list(train(settings(f"{far}/list.csv", "train.epochs=1"), tmp_path / "far"))
    assert_same_result(tmp_path / "plain", tmp_path / "far")
    assert evaluate(Run(tmp_path / "far")).metrics["top1"] == evaluate(Run(tmp_path / "plain")).metrics["top1"]
    bucket.rm("list-bucket/photos/train/2/3.png")
    config = load_config(None, [f"data.path={far}/list.csv"]).data
    with pytest.raises(DataError, match=r"'train/2/3.png' has vanished"):
        prepare_dataset(config, progress=Quiet())
    skipped = prepare_dataset(config.model_copy(update={"broken": "skip"}), progress=Quiet())
    assert [path for path, _ in skipped.broken] == ["train/2/3.png"]


@pytest.mark.parametrize("threads", [1, 2])
def test_far_photos_are_fetched_side_by_side_and_as_often_as_one_by_one(photos, memory, monkeypatch, threads):
    """50 requests of 40 ms take well under the 2 s that they would take one after another."""
    for name, content in members_of(photos).items():
        memory.pipe(f"/slow/{name}", content)
    asked, fetch = [], shards.fetch
    monkeypatch.setattr(shards, "fetch", lambda *given: asked.append(given[0]) or time.sleep(0.04) or fetch(*given))
    index = load("memory://slow")
    started = time.monotonic()
    with Inspection(index.files(), decoding=DecodeSpec((0, 0, 0), 10**8), with_hash=False, cache_folder=None) as seen:
        facts = seen.finish(threads=threads, progress=Quiet())
    assert time.monotonic() - started < 1
    assert not any(fact.problem for fact in facts)
    assert sorted(asked) == sorted(f"memory://slow/{photo.path}" for photo in index.photos)
    assert not shards._coming


@pytest.fixture
def faulty(s3, monkeypatch):
    """The stand-in store behind a door that answers as it is told: by URL and range, a list of faults still to come."""
    bucket = s3()
    bucket.ls("")  # so that it has its own way to the store
    faults, asked = {}, Counter()
    host = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")

    class Door(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            key = (self.path.partition("?")[0], self.headers.get("Range", ""))
            asked[key] += 1
            fault = next((left.pop() for name, left in faults.items() if name in "".join(key) and left), "")
            if fault == "late":
                time.sleep(1.5)  # the client has hung up at 0.5
                return
            if fault == "503":
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            near = http.client.HTTPConnection(host)
            near.request(self.command, self.path, headers=dict(self.headers))
            answer = near.getresponse()
            content = answer.read()
            near.close()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if fault == "half" else content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *given):
            pass

    door = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Door)
    thread = threading.Thread(target=door.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{door.server_port}")
    patience = {"read_timeout": 0.5, "retries": {"max_attempts": 2, "mode": "standard"}}
    monkeypatch.setitem(importlib.import_module("fsspec.config").conf, "s3", {"config_kwargs": patience})
    importlib.import_module("s3fs").S3FileSystem.clear_instance_cache()
    storage._opened.clear()
    yield bucket, faults, asked
    door.shutdown()
    door.server_close()
    thread.join()


def test_a_store_that_fails_for_a_while_is_asked_again_and_one_that_goes_on_is_named(photos, tmp_path, faulty):
    """503, silence and half an answer, for a range of a tar: no label moves, nothing else is lost."""
    bucket, faults, asked = faulty
    members = members_of(photos)
    url = upload(bucket, cut(members, tmp_path / "shards"), "faulty/shards")
    index = load(url)
    assert [file.read_bytes() for file in index.files()] == list(members.values())
    assert {count for (_, span), count in asked.items() if span} == {1}
    places = [f"/{file.location.rpartition('/')[2]}bytes={file.start}-" for file in index.files()]
    late, busy, half, gone, torn = (places[number] for number in (0, 14, 20, 33, 41))
    faults |= {late: ["late"], busy: ["503"], half: ["half"], gone: ["503"] * 99, torn: ["half"] * 99}
    asked.clear()
    config = load_config(None, [f"data.path={url}", "data.broken=skip"]).data
    found = prepare_dataset(config, progress=Quiet())
    assert [path for path, _ in found.broken] == [index.photos[33].path, index.photos[41].path]
    assert all("cannot be read" in reason for _, reason in found.broken)
    for photo, file in zip(found.index.photos, found.index.files(), strict=True):
        inner = photo.path.split("/", 1)[1]
        assert photo.label == inner.split("/")[1]
        assert file.read_bytes() == members[inner]
    assert len(found.index) == len(members) - 2
    assert faults[late] == faults[busy] == faults[half] == []
    with pytest.raises(DataError, match=r"2 of 48 photos cannot be used:\n  's-2.tar/.*' cannot be read"):
        prepare_dataset(config.model_copy(update={"broken": "refuse"}), progress=Quiet())
