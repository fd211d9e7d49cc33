"""Packed photos train as their folder does; a call that was stopped goes on; a folder in use is left alone."""

# ruff: noqa: F401, F811, fixtures of other tests

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from tests.data.test_shards import contents, load, rows, settings
from tests.inference.test_remote import _fresh, make_tar, memory
from tests.runs.test_train import assert_same_result, own_cache, photos

from fieldmark.cli.app import app
from fieldmark.data import packing
from fieldmark.data.packing import pack_photos
from fieldmark.errors import DataError, PhotoError, ResourceError
from fieldmark.inference.sources import open_source
from fieldmark.progress import Quiet
from fieldmark.runs.train import train


def pack(path, out: Path, *, max_bytes: float = 1e9, max_photos: int | None = None, **columns):
    return pack_photos(load(path, **columns), out, max_bytes=max_bytes, max_photos=max_photos, progress=Quiet())


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_training_from_what_was_packed_gives_the_bits_of_training_from_the_folder(photos, tmp_path):
    assert pack(photos, tmp_path / "shards", max_photos=13) == (4, 0)
    index, plain = load(tmp_path / "shards"), load(photos)
    assert [row[1:] for row in rows(index)] == [row[1:] for row in rows(plain)]
    assert contents(index) == contents(plain)
    for name, path in (("plain", photos), ("packed", tmp_path / "shards")):
        list(train(settings(path, "train.epochs=1"), tmp_path / name))
    assert_same_result(tmp_path / "plain", tmp_path / "packed")


def test_a_table_keeps_labels_splits_and_groups_and_may_be_packed_twice(tmp_path):
    for name in ("1.jpg", "1.png", "b/2.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(name.encode())
    table = tmp_path / "in" / "t.csv"
    table.write_text("path,bird,split,group\n1.jpg,jay,train,g\n1.png,01,val,\nb/2.jpg,,test,\n")
    pack(table, tmp_path / "once", label_column="bird")
    inner = [("1.jpg", "jay", "train", "g"), ("1.png", "01", "val", ""), ("b/2.jpg", None, "test", "")]
    for folder, before in (("once", "photos-000000.tar/"), ("twice", "photos-000000.tar/photos-000000.tar/")):
        assert rows(load(tmp_path / folder)) == [(before + row[0], *row[1:]) for row in inner]
        assert contents(load(tmp_path / folder)) == [b"1.jpg", b"1.png", b"b/2.jpg"]
        pack(tmp_path / "once", tmp_path / "twice")


def test_tars_are_of_the_size_asked_for_have_the_same_bytes_each_time_and_their_sums_beside_them(photos, tmp_path):
    for name in ("a", "b"):
        assert pack(photos, tmp_path / name, max_bytes=50_000)[0] > 3
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert all(len(data) < 60_000 for data in bytes_of(tmp_path / "a").values())
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "a", capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "a" / "photos-000000.tar") as archive:
        members = archive.getnames()
    assert members[:2] == ["train/2/0.png", "train/2/0.json"]
    assert next(iter(open_source(str(tmp_path / "a")).names())) == "photos-000000.tar/train/2/0.png"


def test_a_call_that_was_stopped_goes_on_and_writes_what_is_damaged_again(photos, tmp_path, monkeypatch):
    pack(photos, tmp_path / "whole", max_photos=10)
    write, written = packing._write_tar, []

    def stop_at_the_third(path, shard):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, shard)

    monkeypatch.setattr(packing, "_write_tar", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        pack(photos, tmp_path / "out", max_photos=10)
    (tmp_path / "out" / "photos-000002.tar.999999999.part").write_bytes(b"half")
    (tmp_path / "out" / "photos-000001.tar").write_bytes(b"damaged")
    monkeypatch.setattr(packing, "_write_tar", lambda *given: written.append(given[0].name) or write(*given))
    assert pack(photos, tmp_path / "out", max_photos=10) == (5, 1)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert pack(photos, tmp_path / "out", max_photos=10) == (5, 5)


@pytest.mark.slow
def test_a_killed_call_goes_on(photos, tmp_path):
    pack(photos, tmp_path / "whole", max_photos=4)
    out = tmp_path / "out"
    slowed = "import time; from fieldmark.data import packing as p; w = p.digest_file; "
    slowed += "p.digest_file = lambda path: (time.sleep(0.3), w(path))[1]; from fieldmark.cli.app import main; main()"
    call = [sys.executable, "-c", slowed, "pack", str(photos), "--out", str(out), "--photos", "4"]
    process = subprocess.Popen(call)
    while len(list(out.glob("*.tar"))) < 3:
        time.sleep(0.02)
        assert process.poll() is None
    process.kill()
    process.wait()
    assert len(list(out.glob("*.tar"))) < 12
    assert pack(photos, out, max_photos=4)[1] >= 2
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_a_folder_in_use_is_left_alone_and_what_cannot_be_packed_is_one_sentence(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    pack(photos, out, max_photos=30)
    before = bytes_of(out)
    with pytest.raises(DataError, match=r"out was packed from other photos, labels or sizes. Give a new folder"):
        pack(photos, out, max_photos=31)
    make_tar(out / "mine.tar", {})
    with pytest.raises(DataError, match=r"out is in use: 'mine.tar' in it is not of this packing. Give a new folder"):
        pack(photos, out, max_photos=30)
    (out / "mine.tar").unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file is a file. Give a new folder for the tar files"):
        pack(photos, tmp_path / "file")
    with pytest.raises(DataError, match=r"in use: '10' in it"):
        pack(photos, photos / "train")
    assert bytes_of(out) == before
    (tmp_path / "t.csv").write_text(f"path,label\n{photos}/train/2/0.png,jay\n.x.png,jay\n")
    (tmp_path / ".x.png").write_bytes(b"x")
    with pytest.raises(PhotoError, match=r"\.x\.png: has a hidden name, which nobody would look for in a tar"):
        pack(tmp_path / "t.csv", tmp_path / "new")
    monkeypatch.setattr(packing.TarShard, "read", lambda _: iter([("x", b"y")]))
    with pytest.raises(ResourceError, match=r"photos-000000.tar: what is read there is not what was written"):
        pack(photos, tmp_path / "bad")
    assert [file.name for file in (tmp_path / "bad").iterdir()] == ["SHA256SUMS"]


def test_the_verb_says_what_it_did(photos, tmp_path):
    from typer.testing import CliRunner

    words = ["pack", str(photos), "--out", str(tmp_path / "out"), "--photos", "20"]
    assert f"packed 48 photos into 3 tar files in {tmp_path}/out; 0 of" in CliRunner().invoke(app, words).output
    assert "; 3 of these were there before" in CliRunner().invoke(app, words).output
