"""`fieldmark predict` of photos in an object store, alone and shared out: the answers that their folder gets."""

# ruff: noqa: F401, F811, fixtures of other tests

from __future__ import annotations

import csv
import io
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.inference.test_bulk import model, photos, plain, predict, save_photo
from tests.inference.test_ray_parts import Watched, cluster, kill_a_worker_when, on_a_cluster
from tests.inference.test_remote import _fresh, s3

from fieldmark.cli.app import main

BUCKET = "predict-bucket"
SHARD_PHOTOS = 4


def fill(bucket, folder):
    """The photos of a folder one by one, as tar shards and as a Parquet table; gives their names in order."""
    files = sorted(folder.iterdir(), key=lambda path: int(path.stem))
    if bucket.exists(BUCKET):  # the stand-in keeps its buckets for the life of the process
        bucket.rm(BUCKET, recursive=True)
    bucket.makedirs(BUCKET, exist_ok=True)
    for path in files:
        bucket.pipe(f"{BUCKET}/new/{path.name}", path.read_bytes())
    for number, start in enumerate(range(0, len(files), SHARD_PHOTOS)):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for path in files[start : start + SHARD_PHOTOS]:
                archive.add(path, path.name)
        bucket.pipe(f"{BUCKET}/shards/s-{number:04d}.tar", packed.getvalue())
    table = pa.table({"key": [path.name for path in files], "image": [path.read_bytes() for path in files]})
    packed = io.BytesIO()
    pq.write_table(table, packed, row_group_size=SHARD_PHOTOS)
    bucket.pipe(f"{BUCKET}/rows/r.parquet", packed.getvalue())
    return [path.name for path in files]


def rows(path):
    """Rows of a long table, in order, each photo by its file's name."""
    with path.open(newline="") as file:
        return [{**row, "path": row["path"].rpartition("/")[2]} for row in csv.DictReader(file)]


def test_the_command_line_answers_photos_in_s3_as_their_folder(
    model,
    photos,
    tmp_path,
    s3,
    monkeypatch,
    capsys,
):
    names = fill(s3(), photos)
    last = len(names) // SHARD_PHOTOS
    pq.write_table(pa.table({"path": [f"s3://{BUCKET}/new/{name}" for name in names]}), tmp_path / "list.parquet")
    expected = rows(plain(model, photos, tmp_path / "here.csv").out)
    assert [row["path"] for row in expected] == names
    for given in (
        f"s3://{BUCKET}/new",
        f"s3://{BUCKET}/new/*.png",
        f"s3://{BUCKET}/shards",
        f"s3://{BUCKET}/shards/s-{{0000..{last:04d}}}.tar",
        f"s3://{BUCKET}/rows/r.parquet",
        tmp_path / "list.parquet",
    ):
        out = tmp_path / "there.csv"
        words = ["predict", model, given, "--out", out, "--form", "long"]
        monkeypatch.setattr(sys, "argv", ["fieldmark", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        assert ended.value.code == 2, told.err
        assert "1 of 11 photos could not be read" in told.err
        assert "5.png" in told.err
        assert rows(out) == expected, given


@on_a_cluster
@pytest.mark.parametrize("where", ["new", "shards/s-*.tar", "rows"])
def test_a_killed_worker_loses_no_photo_in_s3(model, photos, tmp_path, s3, request, where):
    for number in range(11, 48):
        save_photo(photos / f"{number}.png", number)
    names = fill(s3(), photos)
    machines = request.getfixturevalue("cluster")  # after the bucket's address and keys are in the environment
    parts = tmp_path / "p.csv.parts"
    thread, killed = kill_a_worker_when(lambda: len(list(parts.glob("part-*.parquet"))) >= 2)
    executor = Watched(machines.address)
    done, made = predict(model, f"s3://{BUCKET}/{where}", tmp_path / "p.csv", executor)
    thread.join()
    assert killed
    assert sorted(made) == list(range(12))
    assert (done.count, len(done.failed)) == (48, 1)
    told = rows(tmp_path / "p.csv")
    assert [row["path"] for row in told] == names
    assert told == rows(plain(model, photos, tmp_path / "here.csv").out)
