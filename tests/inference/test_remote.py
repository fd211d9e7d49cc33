"""Photos behind URLs, in lists and in shards: the same names and contents everywhere, and no photo lost unsaid."""

from __future__ import annotations

import gzip
import importlib
import io
import os
import pickle
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fieldmark.data import storage
from fieldmark.data.folders import find_photos
from fieldmark.errors import DataError, MissingExtraError, PhotoError
from fieldmark.inference.sources import digest, open_source, read_ahead

FILES = {
    "10.jpg": b"ten",
    "2.jpg": b"two",
    "a/1.PNG": b"one",
    "a/.hidden.jpg": b"",
    ".trash/3.jpg": b"",
    "__MACOSX/4.jpg": b"",
    "a/notes.txt": b"",
}
NAMES = ["2.jpg", "10.jpg", "a/1.PNG"]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Storages are opened once for a process; each test has its own."""
    monkeypatch.setattr(storage, "_opened", {})


@pytest.fixture
def memory():
    import fsspec

    made = fsspec.filesystem("memory")
    made.store.clear()
    made.pseudo_dirs[:] = [""]
    yield made
    made.store.clear()


def write(folder: Path, files=FILES) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def contents(source):
    """Every photo as (name, content or reason)."""
    taken = []
    for name, photo in source.read(4):
        data = photo.read_bytes() if isinstance(photo, Path) else photo
        taken.append((name, data.reason if isinstance(data, PhotoError) else data))
    return taken


def make_tar(path, members, *, mode="w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def make_table(path, /, **columns) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def test_a_folder_behind_a_url_has_the_names_and_the_order_of_the_same_folder_here(memory, tmp_path):
    here = write(tmp_path / "photos")
    for name, content in FILES.items():
        memory.pipe(f"/bucket/photos/{name}", content)
    names, _ = find_photos(here)
    assert names == NAMES
    for text in ("memory://bucket/photos", "memory://bucket/photos/", f"file://{here}", str(here)):
        source = open_source(text)
        assert source.count == 3
        assert list(source.names()) == NAMES
        assert contents(source) == [("2.jpg", b"two"), ("10.jpg", b"ten"), ("a/1.PNG", b"one")], text


def test_a_single_photo_behind_a_url_is_one_photo(memory):
    memory.pipe("/bucket/x.unknown", b"x")
    assert contents(open_source("memory://bucket/x.unknown")) == [("x.unknown", b"x")]


def test_a_folder_without_photos_says_what_could_be_given(memory):
    memory.pipe("/bucket/notes.txt", b"x")
    with pytest.raises(DataError, match=r"memory://bucket holds no photos: 1 other files there. Give a folder"):
        open_source("memory://bucket")
    with pytest.raises(DataError, match=r"memory://none does not exist"):
        open_source("memory://none")


def test_a_photo_that_vanished_keeps_its_place_with_the_reason(memory):
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        memory.pipe(f"/bucket/{name}", name.encode())
    source = open_source("memory://bucket")
    memory.rm("/bucket/2.jpg")
    assert contents(source) == [("1.jpg", b"1.jpg"), ("2.jpg", "does not exist"), ("3.jpg", b"3.jpg")]


def test_entries_of_a_list_may_be_here_beside_it_or_behind_urls_and_come_in_its_order(memory, tmp_path):
    write(tmp_path)
    memory.pipe("/bucket/far.jpg", b"far")
    entries = ["memory://bucket/far.jpg", "10.jpg", str(tmp_path / "2.jpg"), "10.jpg", ""]
    (tmp_path / "list.csv").write_text("path,more\n" + "".join(f"{entry},x\n" for entry in entries))
    make_table(tmp_path / "list.parquet", path=[*entries[:4], None])
    expected = [*zip(entries, (b"far", b"ten", b"two", b"ten"), strict=False), ("", "has no path in the list")]
    for name in ("list.csv", "list.parquet"):
        source = open_source(str(tmp_path / name))
        assert source.count == 5
        assert contents(source) == expected


def test_a_list_from_windows_or_a_mac_finds_the_photos_and_says_of_others_why_not(tmp_path):
    """Each keeps its row and its name: backslashes, decomposed letters, Windows-1252, a drive."""
    odd = os.fsdecode(b"gr\xfcn.jpg")
    for name in ("caf\u00e9/1.jpg", "robin/2.jpg", odd):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode("utf-8", "surrogateescape"))
    entries = ["cafe\u0301/1.jpg", "robin\\2.jpg", odd, "C:\\photos\\3.jpg", os.fsdecode(b"bl\xe5.jpg"), "gone.jpg"]
    expected = [b"caf\xc3\xa9/1.jpg", b"robin/2.jpg", b"gr\xfcn.jpg"]
    data = "path;more\n" + "".join(f"{entry};x\n" for entry in entries)
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbf" + data.encode("utf-8", "surrogateescape"))
    found = list(open_source(str(tmp_path / "list.csv")).read(8))
    assert [name for name, _ in found] == entries
    assert [os.fsencode(file.read_bytes()) for _, file in found[:3]] == expected
    assert "Windows drive. Write paths relative" in found[3][1].reason
    assert "as Windows-1252 it is 'bl\u00e5.jpg'. Save the table as UTF-8" in found[4][1].reason
    assert found[5][1] == tmp_path / "gone.jpg"


def test_a_list_behind_a_url_begins_at_its_own_folder(memory):
    memory.pipe("/bucket/x/1.jpg", b"1")
    memory.pipe("/bucket/x/list.csv", b"path\n1.jpg\n")
    assert contents(open_source("memory://bucket/x/list.csv")) == [("1.jpg", b"1")]


def test_a_list_without_path_or_without_rows_is_refused(tmp_path):
    make_table(tmp_path / "a.parquet", Path=["1.jpg"])
    with pytest.raises(DataError, match=r"has no column 'path'; it has 'Path'; did you mean 'Path'"):
        open_source(str(tmp_path / "a.parquet"))
    (tmp_path / "b.csv").write_text("path\n")
    with pytest.raises(DataError, match=r"is a list without rows"):
        open_source(str(tmp_path / "b.csv"))


def test_photos_in_a_parquet_table_are_named_by_shard_and_key_and_read_by_row_group(tmp_path):
    make_table(tmp_path / "s.parquet", __key__=["a.jpg", "b.jpg", "c.jpg"], jpg=[b"a", None, b"c"], label=[1, 2, 3])
    source = open_source(str(tmp_path / "s.parquet"))
    assert source.count == 3
    assert len(list(source.cut(100))) == 2
    assert list(source.names()) == ["s.parquet/a.jpg", "s.parquet/b.jpg", "s.parquet/c.jpg"]
    assert contents(source) == [
        ("s.parquet/a.jpg", b"a"),
        ("s.parquet/b.jpg", "has no content in its table"),
        ("s.parquet/c.jpg", b"c"),
    ]


def test_photos_without_keys_are_named_by_their_rows_also_as_hugging_face_stores_them(tmp_path):
    make_table(tmp_path / "s.parquet", image=[{"bytes": text.encode(), "path": None} for text in "abc"])
    source = open_source(str(tmp_path / "s.parquet"))
    assert list(source.names()) == ["s.parquet/0", "s.parquet/1", "s.parquet/2"]
    assert contents(source) == [("s.parquet/0", b"a"), ("s.parquet/1", b"b"), ("s.parquet/2", b"c")]


def test_rows_of_a_damaged_parquet_shard_keep_their_place(tmp_path):
    path = make_table(tmp_path / "s.parquet", key=["a", "b", "c"], image=[b"a" * 999, b"b" * 999, b"c" * 999])
    source = open_source(str(path))
    data = bytearray(path.read_bytes())
    data[200:1200] = bytes(1000)
    path.write_bytes(bytes(data))
    taken = contents(source)
    assert [name for name, _ in taken] == ["s.parquet/0", "s.parquet/1", "s.parquet/c"]
    assert "s.parquet is damaged" in taken[0][1]
    assert taken[2][1] == b"c" * 999


@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tar", "w:bz2"), (".tar", "w:xz")])
def test_photos_of_tar_shards_come_shard_by_shard_in_natural_order(tmp_path, suffix, mode):
    make_tar(tmp_path / f"s-10{suffix}", {"3.jpg": b"3", "3.json": b"{}"}, mode=mode)
    make_tar(tmp_path / f"s-2{suffix}", {"./b.jpg": b"b", "b.cls": b"1", "a.jpg": b"a", ".c.jpg": b""}, mode=mode)
    expected = [(f"s-2{suffix}/b.jpg", b"b"), (f"s-2{suffix}/a.jpg", b"a"), (f"s-10{suffix}/3.jpg", b"3")]
    for text in (str(tmp_path), f"{tmp_path}/s-*{suffix}", f"{tmp_path}/s-{{10,2}}{suffix}"):
        source = open_source(text)
        assert source.count is None
        assert contents(source) == expected
        assert list(source.names()) == [name for name, _ in expected]


def test_shards_behind_a_url_are_read_as_those_here(memory, tmp_path):
    for number in (0, 1):
        path = make_tar(tmp_path / f"s-{number}.tar", {f"{number}.jpg": bytes([number]) * 5000})
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    expected = [("s-0.tar/0.jpg", bytes(5000)), ("s-1.tar/1.jpg", b"\1" * 5000)]
    for text in (
        "memory://bucket",
        "memory://bucket/s-{0..1}.tar",
        "memory://bucket/s-*.tar",
        "memory://bucket/s-?.tar",
    ):
        assert contents(open_source(text)) == expected


def test_a_shard_that_a_brace_names_must_be_there(memory, tmp_path):
    make_tar(tmp_path / "s-0.tar", {"a.jpg": b"a"})
    with pytest.raises(DataError, match=r"s-1.tar does not exist"):
        open_source(f"{tmp_path}/s-{{0..1}}.tar")
    memory.pipe("/bucket/s-0.tar", b"")
    with pytest.raises(DataError, match=r"s-1.tar:? does not exist"):
        open_source("memory://bucket/s-{0..1}.tar")


@pytest.mark.parametrize("place", ["within a photo", "between photos", "within a header", "from the start"])
def test_what_a_damaged_tar_lost_is_told_in_a_row_and_what_it_holds_is_kept(tmp_path, place):
    path = make_tar(tmp_path / "s.tar", {name: name.encode() * 200 for name in ("a.jpg", "b.jpg", "c.jpg")})
    whole = path.read_bytes()
    # Each member is a header of 512 bytes and 1000 bytes of content, padded to 1024.
    cut = {"within a photo": 1536 + 512 + 100, "between photos": 2 * 1536, "within a header": 1536 + 100}
    path.write_bytes(whole[: cut[place]] if place in cut else b"no tar" * 100)
    taken = contents(open_source(str(path)))
    kept = {"within a photo": 1, "between photos": 2, "within a header": 1, "from the start": 0}[place]
    assert [data for _, data in taken[:kept]] == [name.encode() * 200 for name in ("a.jpg", "b.jpg")[:kept]]
    assert taken[-1][0] == "s.tar"
    assert "is damaged" in taken[-1][1]
    if place == "within a photo":
        assert taken[1] == ("s.tar/b.jpg", "cannot be read from s.tar: unexpected end of data")
    if place != "from the start":
        assert "photos behind that are lost" in taken[-1][1]


def test_a_header_of_nonsense_is_no_end(tmp_path):
    path = make_tar(tmp_path / "s.tar", {"a.jpg": b"a" * 1000, "b.jpg": b"b" * 1000})
    data = bytearray(path.read_bytes())
    data[1536:2048] = b"x" * 512
    path.write_bytes(bytes(data))
    assert [name for name, _ in contents(open_source(str(path)))] == ["s.tar/a.jpg", "s.tar"]


def test_pieces_can_be_sent_and_their_digest_changes_with_the_photos(tmp_path):
    write(tmp_path / "photos")
    source = open_source(str(tmp_path / "photos"))
    pieces = list(source.cut(2))
    assert [len(piece.paths) for piece in pieces] == [2, 1]
    assert pickle.loads(pickle.dumps(pieces)) == pieces
    before = [digest(piece) for piece in pieces]
    assert [digest(piece) for piece in source.cut(2)] == before
    (tmp_path / "photos" / "2.jpg").write_bytes(b"another")
    after = [digest(piece) for piece in source.cut(2)]
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_no_more_is_read_than_what_is_used_and_one_part_ahead():
    read = []

    def endless():
        while True:
            read.append(1)
            yield "x", b""

    photos = read_ahead(endless(), 8)
    for _ in range(9):
        next(photos)
    photos.close()
    assert len(read) == 24  # two parts taken, the third on its way


def test_what_is_not_there_here_is_told_as_ever(tmp_path):
    with pytest.raises(DataError, match=r"there is no 'none'"):
        open_source(str(tmp_path / "none"))


def test_an_unknown_protocol_and_a_missing_package_are_one_clear_message(monkeypatch):
    with pytest.raises(DataError, match=r"nonsense://bucket cannot be opened: Protocol not known"):
        open_source("nonsense://bucket/x")
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", raising=False)  # of other tests
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingExtraError, match=r"s3fs is not installed.*fieldmark\[storage\]"):
        open_source("s3://bucket/x")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"gs:// needs a package that is not installed: .*gcsfs"):
        open_source("gs://bucket/x")


@pytest.fixture
def s3(monkeypatch):
    """A stand-in for S3 that speaks its protocol over a socket."""
    from moto import server

    s3fs = importlib.import_module("s3fs")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "none")
    monkeypatch.setenv("AWS_CONFIG_FILE", "none")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    started = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    started.start()
    host, port = started.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()

    def connect():
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        s3fs.S3FileSystem.clear_instance_cache()
        storage._opened.clear()
        return s3fs.S3FileSystem()

    connect.server = started
    yield connect
    s3fs.S3FileSystem.clear_instance_cache()
    started.stop()


def test_photos_lists_and_shards_in_s3_are_read_as_those_here(s3, tmp_path):
    bucket = s3()
    bucket.mkdir("photos-bucket")
    for name, content in FILES.items():
        bucket.pipe(f"photos-bucket/new/{name}", content)
    shard = make_tar(tmp_path / "s.tar", {"a.jpg": b"a" * 9000, "b.jpg": b"b"})
    bucket.put(str(shard), "photos-bucket/shards/s-0.tar")
    rows = make_table(tmp_path / "r.parquet", key=["x", "y", "z"], image=[b"x", b"y", b"z"])
    bucket.put(str(rows), "photos-bucket/rows/r.parquet")
    (tmp_path / "list.csv").write_text("path\ns3://photos-bucket/new/2.jpg\ns3://photos-bucket/new/none.jpg\n")

    source = open_source("s3://photos-bucket/new")
    assert contents(source) == [("2.jpg", b"two"), ("10.jpg", b"ten"), ("a/1.PNG", b"one")]
    before = [digest(piece) for piece in source.cut(9)]
    bucket.pipe("photos-bucket/new/2.jpg", b"owt")  # as many bytes: S3's own digest tells
    assert [digest(piece) for piece in open_source("s3://photos-bucket/new").cut(9)] != before
    assert contents(open_source("s3://photos-bucket/shards/s-*.tar")) == [
        ("s-0.tar/a.jpg", b"a" * 9000),
        ("s-0.tar/b.jpg", b"b"),
    ]
    assert contents(open_source("s3://photos-bucket/rows")) == [(f"r.parquet/{k}", k.encode()) for k in "xyz"]
    assert contents(open_source(str(tmp_path / "list.csv"))) == [
        ("s3://photos-bucket/new/2.jpg", b"owt"),
        ("s3://photos-bucket/new/none.jpg", "does not exist"),
    ]


def test_missing_credentials_and_a_missing_bucket_end_the_work_with_one_message(s3, tmp_path):
    (tmp_path / "list.csv").write_text("path\ns3://no-such-bucket/1.jpg\n")
    with pytest.raises(DataError, match=r"cannot be reached: Unable to locate credentials.*AWS_ACCESS_KEY_ID"):
        open_source("s3://photos-bucket/new")
    with pytest.raises(DataError, match=r"Unable to locate credentials"):
        contents(open_source(str(tmp_path / "list.csv")))
    s3()
    with pytest.raises(DataError, match=r"s3://no-such-bucket/new: The specified bucket does not exist"):
        open_source("s3://no-such-bucket/new")
    with pytest.raises(DataError, match=r"The specified bucket does not exist"):
        contents(open_source(str(tmp_path / "list.csv")))


def test_a_member_that_unpacks_to_more_than_any_photo_is_named_unread_and_the_rest_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("fieldmark.data.shards.MAX_MEMBER_BYTES", 10_000)
    sizes = {"a.png": 9_000, "bomb.png": 5_000_000, "c.png": 10_000}
    with tarfile.open(tmp_path / "s.tgz", "w:gz") as archive:
        for name, size in sizes.items():
            info = tarfile.TarInfo(name)
            info.size = size
            archive.addfile(info, io.BytesIO(bytes(size)))
    assert (tmp_path / "s.tgz").stat().st_size < 10_000
    found = dict(open_source(str(tmp_path / "s.tgz")).read(2))
    assert [len(found[f"s.tgz/{name}"]) for name in ("a.png", "c.png")] == [9_000, 10_000]
    assert isinstance(found["s.tgz/bomb.png"], PhotoError)
    assert found["s.tgz/bomb.png"].reason == "takes 5 MB in s.tgz, more than the 0 MB of a photo"


def test_a_packed_bomb_is_passed_over_in_bounded_memory_and_time(tmp_path):
    """Two gigabytes of zeros in two megabytes: `tarfile` would hold the gigabyte that a block of it becomes."""
    info = tarfile.TarInfo("bomb.jpg")
    info.size = 2 << 30
    with gzip.open(tmp_path / "s.tgz", "wb", compresslevel=1) as packed:
        packed.write(info.tobuf())
        for _ in range(128):
            packed.write(bytes(16 << 20))
        packed.write(tarfile.TarInfo("b.jpg").tobuf() + bytes(10240))
    started = time.process_time()
    tracemalloc.start()
    found = list(open_source(str(tmp_path / "s.tgz")).read(2))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [name for name, _ in found] == ["s.tgz/bomb.jpg", "s.tgz/b.jpg"]
    assert "takes 2,048 MB in s.tgz, more than the 1024 MB of a photo" in found[0][1].reason
    assert most < 32 * 2**20
    assert time.process_time() - started < 60


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_every_cut_and_many_flips_of_a_packed_tar_are_rows_and_no_traceback(tmp_path, mode):
    rng = np.random.default_rng(0)
    whole = {f"{number}.jpg": rng.bytes(400) for number in range(5)}
    path = make_tar(tmp_path / "s.tgz", whole, mode=mode)
    data = path.read_bytes()
    damaged = [data[:length] for length in range(0, len(data), 23)]
    for place in rng.choice(len(data), 150, replace=False):
        damaged.append(data[:place] + bytes([data[place] ^ (1 << rng.integers(8))]) + data[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        for name, found in open_source(str(path)).read(4):
            assert isinstance(found, PhotoError) or name.startswith("s.tgz/")
            assert not isinstance(found, PhotoError) or "\n" not in found.reason
