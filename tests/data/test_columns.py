"""Laws of the columns: they are the photos that went in, in natural order, however many there are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from natsort import natsort_keygen

from fieldmark.data import index, shards
from fieldmark.data.columns import PARTS, Categories, Photos, Texts, natural_order
from fieldmark.data.folders import Photo, natural_key
from fieldmark.data.index import PhotoIndex, find_split_table, load_index, load_split_table, save_split_table
from fieldmark.data.shards import StoredPhoto
from fieldmark.data.splits import remembered_split
from fieldmark.errors import DataError

ODD = st.text(st.sampled_from("ab01290é²٣\1\3_. \udc80"), max_size=6)
PART = ODD | st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), max_size=4)
PATH = st.lists(PART, min_size=1, max_size=3).map("/".join).filter(lambda path: not path.startswith("/"))
COLUMNS = {"path_column": "path", "label_column": "label", "split_column": "split", "group_column": "group"}


@settings(max_examples=300, deadline=None)
@given(st.lists(PATH, max_size=12), st.sampled_from(["", "x/", "ab1/é/", "s3://bucket/07/"]))
def test_the_order_is_that_of_natsort_folder_by_folder_and_texts_come_back(paths, before):
    paths = [before + path for path in paths]
    texts, of_part = Texts.of(paths), natsort_keygen()

    def reference(path):
        *folders, name = map(of_part, path.split("/"))
        return tuple(folders), name, path

    assert natural_order(texts).tolist() == sorted(range(len(paths)), key=lambda number: reference(paths[number]))
    assert sorted(paths, key=natural_key()) == sorted(paths, key=reference)
    assert list(texts) == paths
    assert list(Categories.of(paths)) == paths
    assert texts.find(Texts.of(paths[::2])).tolist() == [paths[::2].index(p) if p in paths[::2] else -1 for p in paths]


def make_photos(count: int) -> list[Photo]:
    return [
        Photo(f"{n // 7}/{n}\udcff.jpg", f"0{n % 3}" if n % 5 else None, PARTS[n % 4], "g" * (n % 3))
        for n in range(count)
    ]


def test_columns_are_the_photos_that_went_in():
    photos = make_photos(40)
    columns = Photos.of(photos)
    assert columns == photos
    assert columns[7] == photos[7]
    assert columns[3:9] == photos[3:9]
    assert columns[np.array([5, 2])] == [photos[5], photos[2]]
    assert columns[columns.splits == 1] == [photo for photo in photos if photo.split == "val"]
    assert columns[:9].append(columns[9:]) == photos
    assert columns != photos[1:]
    assert Photos.of(()) == ()


@pytest.mark.parametrize("most", [10, 1000])
def test_a_large_split_table_is_parquet_and_read_by_the_same_name(tmp_path, monkeypatch, most):
    monkeypatch.setattr(index, "MOST_CSV_ROWS", most)
    found = PhotoIndex(Path("/data"), tuple(make_photos(40)), ("00", "01", "02"), {})
    table = tmp_path / "split.csv"
    save_split_table(found, find_split_table(table, len(found)))
    assert [file.suffix for file in tmp_path.iterdir()] == [".parquet" if most == 10 else ".csv"]
    again = load_split_table(find_split_table(table), Path("/data"))
    assert again == found
    assert again.fingerprint() == found.fingerprint()
    if most == 10:  # what other programs read: text where it is UTF-8
        content = pq.read_table(tmp_path / "split.parquet")
        assert content["label"].to_pylist()[1] == "01"
        assert content["path"].to_pylist()[0] == b"0/0\xff.jpg"


def test_a_split_that_grows_beyond_csv_keeps_its_photos(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "MOST_CSV_ROWS", 30)
    kept = {"val_fraction": 0.2, "test_fraction": 0.1, "seed": 0, "groups": None, "settings": {}, "folder": tmp_path}
    photos = [replace(photo, label="x", split="") for photo in make_photos(40)]
    first = remembered_split(PhotoIndex(Path("/data"), tuple(photos[:20]), ("x",), {}), **kept)
    grown = remembered_split(PhotoIndex(Path("/data"), tuple(photos), ("x",), {}), **kept)
    assert grown.photos[:20] == first.photos
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".csv", ".parquet"]
    assert remembered_split(PhotoIndex(Path("/data"), tuple(photos), ("x",), {}), **kept) == grown


def test_many_urls_are_taken_at_their_word_and_labels_stay_what_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_LOOKED_UP", 2)
    monkeypatch.setattr(shards, "find_objects", lambda urls: pytest.fail("a photo was looked up"))
    columns = {
        "path": ["s3://b/10.jpg", "s3://b/9.jpg", "s3://b/9.jpg", "s3://b/1.jpg"],
        "label": ["01", "1e3", "1e3", "01"],
        "weight": [0.5, 1, 2, 3],
    }
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    found = load_index(tmp_path / "list.parquet", **COLUMNS)
    assert [(photo.path, photo.label) for photo in found.photos] == [
        ("s3://b/1.jpg", "01"),
        ("s3://b/9.jpg", "1e3"),
        ("s3://b/10.jpg", "01"),
    ]
    assert found.ignored == {"row that repeats another": 1}
    file = found.files()[1]
    assert isinstance(file, StoredPhoto)
    assert (file.location, file.num_bytes, file.is_file()) == ("s3://b/9.jpg", -1, True)
    assert len(found.fingerprint()) == 64
    columns["label"][2] = "2"
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    with pytest.raises(DataError, match=r"line 3: 's3://b/9.jpg' has two labels, '1e3' and '2'"):
        load_index(tmp_path / "list.parquet", **COLUMNS)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_every_kind_of_text_in_parquet_is_the_text_that_csv_has(tmp_path, kind):
    paths = pa.array(["s3://b/a.jpg", "s3://b/b.jpg"]).cast(kind)
    pq.write_table(pa.table({"path": paths, "label": pa.array([True, False])}), tmp_path / "list.parquet")
    table = index.read_table(tmp_path / "list.parquet")
    assert list(table.column("path")) == ["s3://b/a.jpg", "s3://b/b.jpg"]
    assert list(table.column("label")) == ["True", "False"]
