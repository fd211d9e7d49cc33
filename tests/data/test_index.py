"""Laws of reading a data set: names stay as they are, nothing is lost uncounted, and mistakes are named."""

from __future__ import annotations

import os
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmark.data import folders, index
from fieldmark.data.index import Photo, PhotoIndex, load_index
from fieldmark.errors import DataError

COLUMNS = {"path_column": "path", "label_column": "label", "split_column": "split", "group_column": "group"}


def make_files(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode(errors="surrogateescape"))
    return root


def make_table(root: Path, text: str, *photos: str, name: str = "photos.csv") -> Path:
    make_files(root, *photos)
    (root / name).write_text(text, encoding="utf-8", newline="")
    return root / name


def load(path: Path) -> PhotoIndex:
    return load_index(path, **COLUMNS)


def rows(found: PhotoIndex) -> list[tuple[str, str | None, str, str]]:
    return [(photo.path, photo.label, photo.split, photo.group) for photo in found.photos]


def error_of(call, *args) -> str:
    with pytest.raises(DataError) as caught:
        call(*args)
    return str(caught.value)


def test_split_folders_give_split_and_class_by_name_in_natural_order(tmp_path):
    make_files(tmp_path, "train/10/b.JPG", "train/2/a10.jpg", "train/2/a9.png", "Validation/10/c.webp", "test/z.jpg")
    found = load(tmp_path)
    assert rows(found) == [
        ("Validation/10/c.webp", "10", "val", ""),
        ("test/z.jpg", None, "test", ""),
        ("train/2/a9.png", "2", "train", ""),
        ("train/2/a10.jpg", "2", "train", ""),
        ("train/10/b.JPG", "10", "train", ""),
    ]
    assert found.classes == ("2", "10")
    assert found.label_numbers().tolist() == [1, -1, 0, 0, 1]
    assert found.label_numbers().dtype == np.int64
    assert found.counts() == {"2": {"train": 2, "val": 0, "test": 0}, "10": {"train": 1, "val": 1, "test": 0}}
    assert found.of("val").classes == found.classes
    assert [file.exists() for file in found.files()] == [True] * 5


def test_a_flat_folder_of_classes_has_no_split_and_01_stays_01(tmp_path):
    make_files(tmp_path, "01/a.jpg", "1/a.jpg", "1/deep/er/b.jpg")
    assert rows(load(tmp_path)) == [
        ("01/a.jpg", "01", "", ""),
        ("1/a.jpg", "1", "", ""),
        ("1/deep/er/b.jpg", "1", "", ""),
    ]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["Training/a/1.jpg", "Testing/a/1.jpg"], {"Training": "train", "Testing": "test"}),
        (["train_images/a/1.jpg", "dev/a/1.jpg"], {"train_images": "train", "dev": "val"}),
        (["TrainSet/a/1.jpg", "valid-data/a/1.jpg"], {"TrainSet": "train", "valid-data": "val"}),
        (["train/a/1.jpg", "test/a/1.jpg", "extras/1.jpg"], {"train": "train", "test": "test"}),
    ],
)
def test_usual_spellings_of_splits_are_known_and_the_layout_is_said(tmp_path, names, splits):
    found = load(make_files(tmp_path, *names))
    assert {photo.path.split("/")[0]: photo.split for photo in found.photos} == splits
    assert found.layout.startswith("read as splits: ")
    assert all(f"{split} from {folder}/" in found.layout for folder, split in splits.items())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train/steam/1.jpg", "train/diesel/1.jpg", "bus/1.jpg"], "train/ as the photos to train on"),
        (["train/a/1.jpg", "train/b/1.jpg", "test/1.jpg", "other/1.jpg"], "and without 'other' (1 photos)"),
        (["seg_train/seg_train/a/1.jpg", "seg_test/seg_test/a/1.jpg"], "'seg_test', 'seg_train' as classes, or"),
        (["fold1/a/1.jpg", "fold1/b/1.jpg", "fold2/a/1.jpg", "fold2/b/1.jpg"], "the classes 'a', 'b'"),
    ],
)
def test_a_layout_that_can_be_read_in_two_ways_is_refused_and_its_ways_out_work(tmp_path, names, expected):
    make_files(tmp_path / "data", *names)
    message = error_of(load, tmp_path / "data")
    assert "can be read in two ways" in message
    assert expected in message
    (tmp_path / "all").mkdir()
    (tmp_path / "data").rename(tmp_path / "all/train")
    assert load(tmp_path / "all").classes == tuple(sorted({name.split("/")[0] for name in names}))


def test_the_layout_says_what_folders_of_classes_could_be_besides(tmp_path):
    make_files(tmp_path / "a", "wren/male/1.jpg", "wren/female/1.jpg", "robin/male/1.jpg", "robin/female/1.jpg")
    make_files(tmp_path / "b", "bus/1.jpg", "test/1.jpg")
    assert "each holds 'female', 'male': if those are the classes" in load(tmp_path / "a").layout
    assert load(tmp_path / "b").layout == "read as one class per folder; 'test' too is a class"


def test_what_fieldmark_wrote_is_never_a_photo(tmp_path):
    make_files(
        tmp_path,
        *("a/1.jpg", "b/1.jpg"),
        *("runs/x/recipe.toml", "runs/x/split.csv", "runs/x/confusion.png", "runs/x/best/1.png"),
        *("a/export/fieldmark.json", "a/export/example.jpg"),
        *("report.md", "report_files/accuracy.png", "scores/evaluation.json", "scores/confusion.png"),
        *("cache/CACHEDIR.TAG", "cache/1.jpg"),
        *("b/confusion.png", "preview.png"),
    )
    found = load(tmp_path)
    assert [photo.path for photo in found.photos] == ["a/1.jpg", "b/1.jpg", "b/confusion.png"]
    assert found.ignored == {"folder written by Fieldmark": 5, "not a photo": 1, "photo beside the class folders": 1}


def test_files_that_look_like_photos_count_whether_they_can_be_read_or_not(tmp_path):
    make_files(tmp_path, "a/1.HEIC", "a/2.jxl", "a/3.nef", "b/4.CR2", "b/4.JPG")
    found = load(tmp_path)
    assert [photo.path for photo in found.photos] == ["a/1.HEIC", "a/2.jxl", "a/3.nef", "b/4.JPG"]
    assert found.ignored == {"raw file of a photo that is there": 1}


@pytest.mark.parametrize("name", ["photos.zip", "photos.gz", "photos.rar"])
def test_an_archive_is_told_to_be_unpacked(tmp_path, name):
    make_files(tmp_path, name)
    assert "is an archive. Unpack it" in error_of(load, tmp_path / name)


def test_a_class_whose_name_is_not_text_is_refused_with_its_name(tmp_path):
    make_files(tmp_path, os.fsdecode(b"gr\xfcn/1.jpg"), "rot/1.jpg")
    assert r"the class folder b'gr\xfcn' is not UTF-8; as Windows-1252 it is 'grün'" in error_of(load, tmp_path)
    outside = make_files(tmp_path / os.fsdecode(b"\xff"), "a/1.jpg")
    assert r"\xff' is not UTF-8" in error_of(load, outside)


def test_a_table_in_another_encoding_is_refused_with_the_one_that_fits(tmp_path):
    make_files(tmp_path, "a.jpg", "grün.jpg", os.fsdecode(b"gr\xfcn too.jpg"))
    (tmp_path / "t.csv").write_bytes("path,label\na.jpg,rot\na.jpg,grün\n".encode("cp1252"))
    assert r"t.csv, line 3: b'gr\xfcn' is not UTF-8; as Windows-1252 it is 'grün'" in error_of(load, tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes("path,label\ngrün.jpg,rot\n".encode("cp1252"))
    assert "as Windows-1252 it is 'grün.jpg'. Save the table as UTF-8" in error_of(load, tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes(b"path,label\ngr\xfcn too.jpg,rot\n")  # as the file system spells it
    assert [os.fsencode(photo.path) for photo in load(tmp_path / "t.csv").photos] == [b"gr\xfcn too.jpg"]


def test_paths_are_found_under_backslashes_and_other_unicode_forms(tmp_path):
    on_disk = unicodedata.normalize("NFD", "vögel/grün.jpg")
    table = make_table(tmp_path, "path,label\nvögel/grün.jpg,x\nsub\\a.jpg,y\n", on_disk, "sub/a.jpg")
    assert [photo.path for photo in load(table).photos] == ["sub/a.jpg", on_disk]
    found, corrections = make_corrections(tmp_path / "c", "a\\1.jpg,drop,\n")
    assert [photo.path for photo in index.apply_corrections(found, corrections).photos] == ["a/2.jpg", "b/1.jpg"]


def test_a_link_to_itself_is_a_photo_that_cannot_be_read(tmp_path):
    make_files(tmp_path, "a/1.jpg", "b/1.jpg")
    (tmp_path / "a/loop.jpg").symlink_to("loop.jpg")
    found = load(tmp_path)
    assert [photo.path for photo in found.photos] == ["a/1.jpg", "a/loop.jpg", "b/1.jpg"]
    assert len(found.fingerprint()) == 64


def test_classes_named_train_and_test_among_others_are_classes(tmp_path):
    make_files(tmp_path, "train/locomotive.jpg", "train/steam/a.jpg", "bus/a.jpg", "test/tube.jpg")
    assert load(tmp_path).classes == ("bus", "test", "train")


def test_everything_left_aside_is_counted_by_reason(tmp_path):
    make_files(
        tmp_path,
        "a/1.jpg",
        "a/Thumbs.db",
        "a/notes.txt",
        "a/film.mpg",
        "b/1.jpg",
        "b/.DS_Store",
        ".ipynb_checkpoints/1.jpg",
        "__MACOSX/a/1.jpg",
        "stray.jpg",
    )
    found = load(tmp_path)
    assert [photo.path for photo in found.photos] == ["a/1.jpg", "b/1.jpg"]
    assert found.ignored == {
        "hidden": 2,
        "made by the operating system": 2,
        "not a photo": 2,
        "photo beside the class folders": 1,
    }


def test_links_are_followed_and_loops_end(tmp_path):
    make_files(tmp_path, "data/a/1.jpg", "data/b/1.jpg", "elsewhere/2.jpg")
    (tmp_path / "data/c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/b/gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    (tmp_path / "data/b/self").symlink_to(tmp_path / "data/b/self")
    os.mkfifo(tmp_path / "data/b/pipe.jpg")
    found = load(tmp_path / "data")
    assert [photo.path for photo in found.photos] == ["a/1.jpg", "b/1.jpg", "b/gone.jpg", "c/2.jpg"]
    assert found.ignored == {"link to a folder that it lies in": 1, "broken link": 1, "not a regular file": 1}


def test_only_extensions_that_can_be_read_count_as_photos():
    extensions = folders.photo_extensions()
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp", ".gif", ".avif"} <= extensions
    assert not {".pdf", ".mpg", ".h5", ".txt", ".eps"} & extensions


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "is empty: there are no photos"),
        (["a/readme.txt"], "holds no photos (not a photo: 1)"),
        (["1.jpg", "2.jpg"], "no class folders, only photos, such as '1.jpg' and 1 more"),
        (["train/1.jpg", "val/a/1.jpg"], "no class folders in the train folder, only photos"),
        (["train/a/1.jpg", "val/1.jpg"], "no class folders in the val folder, only photos"),
        (["train/a/1.jpg", "val/a/1.jpg", "valid/a/1.jpg"], "has both val/ and valid/"),
        (["birds/train/a/1.jpg", "birds/val/a/1.jpg"], "holds only 'birds', with a train folder in it"),
        (["birds/a/1.jpg", "birds/b/1.jpg"], "holds only 'birds', with 2 folders in it: 'a', 'b'. If those are"),
    ],
)
def test_a_folder_that_is_no_data_set_says_why(tmp_path, names, expected):
    make_files(tmp_path, *names)
    assert expected in error_of(load, tmp_path)


def test_a_path_that_does_not_exist_is_answered_with_the_nearest_name(tmp_path):
    make_files(tmp_path, "Flowers/a/1.jpg")
    message = error_of(load, tmp_path / "flower" / "a")
    assert "does not exist" in message
    assert "did you mean 'Flowers'?" in message
    assert f"there is no 'no such folder' in {Path.cwd()}" in error_of(load, Path("no such folder"))


@pytest.mark.parametrize(
    ("name", "expected"), [("notes.txt", "is a file, but not a table"), ("a.jpg", "is one photo. Give the folder")]
)
def test_a_file_that_is_no_table_is_refused(tmp_path, name, expected):
    make_files(tmp_path, name)
    assert expected in error_of(load, tmp_path / name)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    make_files(tmp_path, "a/1.jpg", "locked/1.jpg")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "locked cannot be listed: Permission denied" in error_of(load, tmp_path)


def test_a_table_is_text_exactly_as_written(tmp_path):
    text = 'path,label,split,group\nb.jpg, 01,,g1\na.jpg,1e3,valid,\n"c,\n"".jpg","x,y",TEST,\nd.jpg,,test,\n'
    table = make_table(tmp_path, text, "a.jpg", "b.jpg", 'c,\n".jpg', "d.jpg")
    assert rows(load(table)) == [
        ("a.jpg", "1e3", "val", ""),
        ("b.jpg", " 01", "", "g1"),
        ('c,\n".jpg', "x,y", "test", ""),
        ("d.jpg", None, "test", ""),
    ]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("t.csv", "\ufeffpath;label\na.jpg;x\n".encode()),
        ("t.tsv", b"path\tlabel\na.jpg\tx\n\n"),
        ("t.csv", "path,label\r\na.jpg,x\r\n".encode("utf-16")),
        ("t.csv", "path,label\r\na.jpg,x\r\n".encode("utf-16-le")),
        ("t.csv", b"sep=;\r\npath;label\r\na.jpg;x\r\n;\r\n"),
        ("t.csv", b'\xef\xbb\xbf"sep=|"\r\npath|label\r\na.jpg|x\r\n'),
    ],
)
def test_tables_of_spreadsheets_are_read(tmp_path, name, data):
    make_files(tmp_path, "a.jpg")
    (tmp_path / name).write_bytes(data)
    assert rows(load(tmp_path / name)) == [("a.jpg", "x", "", "")]


def test_a_parquet_table_reads_as_its_csv_would(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    make_files(tmp_path, "a.jpg", "b.jpg")
    columns = {"path": ["a.jpg", "b.jpg"], "label": [10, 2], "split": ["train", None], "width": [0.5, None]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert rows(load(tmp_path / "t.parquet")) == [("a.jpg", "10", "train", ""), ("b.jpg", "2", "", "")]
    assert load(tmp_path / "t.parquet").classes == ("2", "10")
    pq.write_table(pa.table({"path": ["a.jpg"], "label": [1.0]}), tmp_path / "t.parquet")
    assert "column 'label' holds double numbers" in error_of(load, tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_bytes(b"not parquet")
    assert "is not a Parquet table" in error_of(load, tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty: its first line must name the columns"),
        ("path,label\n", "has no rows"),
        ("path,lable\na.jpg,x\n", "has no column 'label'; it has 'path', 'lable'; did you mean 'lable'?"),
        ("file,label\na.jpg,x\n", "or say which it is: --set data.path_column=NAME"),
        ("path,class\na.jpg,x\n", "or say which it is: --set data.label_column=NAME"),
        ("path,label,label\na.jpg,x,y\n", "has two columns named 'label'"),
        ("sep=;\npath;label\n\na.jpg;x;y\n", "line 4: 3 values, but the header names 2 columns"),
        ('path,label\na.jpg,x\n"b.jpg,y\nc.jpg,z\n', "line 3: a double quote is opened and never closed"),
        ("path,label\n,\na.jpg,x\nA.jpg,y\n", "'A.jpg', the first in line 4; did you mean 'a.jpg'?"),
        (
            "path,label\nC:\\photos\\a.jpg,x\n",
            "the first in line 2. 'C:\\\\photos\\\\a.jpg' is a path of a Windows drive",
        ),
        ("path,label\na.jpg,x,y\n", "line 2: 3 values, but the header names 2 columns"),
        ('path,label\n"a.jpg,x\n', "is not a CSV table"),
        ("path,label\na.jpg,\n", "'a.jpg' has an empty 'label'"),
        ("path,label,split\na.jpg, ,train\n", "'a.jpg' has an empty 'label'"),
        ("path,label\n,x\n", "line 2: this row names no photo"),
        ("path,label\na\0.jpg,x\n", "holds a zero byte"),
        ("path,label\na.jpg,x\ngone.jpg,y\n", "1 of 2 photos not found"),
        (f"path,label\n{'a' * 400}.jpg,y\n", "1 of 1 photos not found"),
        ("path,label\n../a.jpg,x\n", "'../a.jpg' leads out of the table's folder"),
        ("path,label\na.jpg,x\n./a.jpg,y\n", "'a.jpg' has two labels, 'x' and 'y'"),
        ("path,label,split\na.jpg,x,train\na.jpg,x,val\n", "'a.jpg' has two splits, 'train' and 'val'"),
        ("path,label,split\na.jpg,x,tain\n", "'tain' is not a split; did you mean 'train'?"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(tmp_path, text, expected):
    assert expected in error_of(load, make_table(tmp_path, text, "a.jpg"))


def test_a_repeated_row_counts_once_and_is_counted(tmp_path):
    found = load(make_table(tmp_path, "path,label\na.jpg,x\na.jpg,x\n", "a.jpg"))
    assert len(found) == 1
    assert found.ignored == {"row that repeats another": 1}


def test_absolute_paths_outside_the_tables_folder_move_the_root(tmp_path):
    make_files(tmp_path, "photos/a/1.jpg", "photos/b/1.jpg")
    text = "path,label\n" + "".join(f"{tmp_path}/photos/{name}/1.jpg,{name}\n" for name in "ab")
    (tmp_path / "tables").mkdir()
    found = load(make_table(tmp_path / "tables", text))
    assert found.root == tmp_path / "photos"
    assert [photo.path for photo in found.photos] == ["a/1.jpg", "b/1.jpg"]
    assert load(make_table(tmp_path, text)).root == tmp_path


NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=("Cs",)), min_size=1, max_size=20)


@given(st.lists(st.tuples(NAMES, NAMES | st.none(), st.sampled_from(["train", "val", "test", ""]), NAMES)))
def test_a_split_table_is_read_back_exactly_in_the_same_order(photos):
    photos = tuple(Photo(path + "\udcff\udc80", label, split, group) for path, label, split, group in photos)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "split.csv"
        index.save_split_table(PhotoIndex(Path("/data"), photos, (), {}), table)
        assert index.load_split_table(table, Path("/data")).photos == photos
        assert [path.name for path in Path(folder).iterdir()] == ["split.csv"]


def test_odd_names_on_disk_go_through_folder_and_table(tmp_path):
    names = [
        "newline\n.jpg",
        'quote".jpg',
        "comma,.jpg",
        "ünï 日本.jpg",
        os.fsdecode(b"latin-\xe9.jpg"),
        "x" * 250 + ".jpg",
    ]
    label = "cl,a\n日本"
    found = load(make_files(tmp_path, *(f"{label}/{name}" for name in names)))
    assert found.classes == (label,)
    assert {photo.path.split("/")[1] for photo in found.photos} == set(names)
    index.save_split_table(found, tmp_path / "split.csv")
    assert load(tmp_path / "split.csv").photos == found.photos
    assert len(found.fingerprint()) == 64


def test_a_python_that_reads_names_as_ascii_is_told_the_way_out(tmp_path, monkeypatch):
    make_files(tmp_path, "auk/1.jpg")
    monkeypatch.setattr(index.sys, "getfilesystemencoding", lambda: "ascii")
    assert load(tmp_path).classes == ("auk",)
    make_files(tmp_path, "ünder/1.jpg")
    with pytest.raises(DataError, match=r"names such as 'ünder/1.jpg' as ASCII. Set PYTHONUTF8=1"):
        load(tmp_path)


def test_the_fingerprint_follows_path_label_split_and_size(tmp_path):
    make_files(tmp_path, "train/a/1.jpg", "train/b/1.jpg")
    found = load(tmp_path)
    first = found.fingerprint()
    assert load(tmp_path).fingerprint() == first
    (tmp_path / "train/a/1.jpg").write_bytes(b"longer than before")
    second = found.fingerprint()
    (tmp_path / "train/a/1.jpg").unlink()
    others = [first, second, found.fingerprint()]
    for photo in (
        Photo("x", "a", "", ""),
        Photo("x", "b", "", ""),
        Photo("x", None, "", ""),
        Photo("x", "a", "val", ""),
    ):
        others.append(PhotoIndex(tmp_path, (photo,), ("a", "b"), {}).fingerprint())
    assert len(set(others)) == len(others)


def make_corrections(tmp_path: Path, text: str) -> tuple[PhotoIndex, Path]:
    found = load(make_files(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg"))
    (tmp_path / "corrections.csv").write_text("path,action,label\n" + text)
    return found, tmp_path / "corrections.csv"


def test_corrections_relabel_and_drop_and_leave_the_rest(tmp_path):
    found, table = make_corrections(tmp_path, "a/1.jpg,relabel,b\na/2.jpg,keep,\nb/1.jpg,drop,\nb/1.jpg,drop,x\n")
    corrected = index.apply_corrections(found, table)
    assert rows(corrected) == [("a/1.jpg", "b", "", ""), ("a/2.jpg", "a", "", "")]
    assert corrected.classes == ("a", "b")
    assert corrected.ignored == {"dropped by corrections": 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/3.jpg,drop,\n", "there is no photo 'a/3.jpg'"),
        ("a/1.jpg,delete,\n", "has the action 'delete'; use keep, relabel or drop"),
        ("a/1.jpg,relabel,\n", "is relabeled '', which is not a class"),
        ("a/1.jpg,relabel,B\n", "which is not a class; did you mean 'b'?"),
        ("a/1.jpg,relabel,b\na/1.jpg,drop,\n", "two decisions about 'a/1.jpg'"),
    ],
)
def test_corrections_that_make_no_sense_are_refused(tmp_path, text, expected):
    found, table = make_corrections(tmp_path, text)
    assert expected in error_of(index.apply_corrections, found, table)


def test_a_split_table_with_an_unknown_split_is_refused(tmp_path):
    (tmp_path / "split.csv").write_text("path,label,split,group\na.jpg,x,dev,\n")
    with pytest.raises(DataError, match="'dev' is not a split"):
        index.load_split_table(tmp_path / "split.csv", tmp_path)
