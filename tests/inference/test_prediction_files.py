"""Prediction files: one row a photo, in order, names unharmed, failures explicit, whole or absent."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmark.errors import PredictionError, ResourceError
from fieldmark.inference.predictor import Prediction
from fieldmark.inference.taxonomy import Fallback
from fieldmark.inference.writers import (
    check_sample,
    choose_form,
    in_sample_order,
    leaderboard_names,
    save_predictions,
)

CLASSES = ("2", "10", "great, tit")


def make_prediction(path, probabilities=(0.2, 0.3, 0.5), problem="", classes=CLASSES):
    row = np.array(probabilities, np.float32) if not problem else np.full(len(classes), np.nan, np.float32)
    return Prediction(path=path, classes=tuple(classes), probabilities=row, problem=problem)


def read_csv(path):
    return list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8", "surrogateescape"), newline="")))


ROWS = [
    make_prediction("b/2.jpg", (0.7, 0.2, 0.1)),
    make_prediction("b/10.jpg"),
    make_prediction("b/11.png", problem="truncated"),
]


def test_a_table_for_people_has_the_path_the_label_and_the_next_two_classes(tmp_path):
    unsure = replace(make_prediction("b/12.jpg"), threshold=0.6)
    done = save_predictions([*ROWS, unsure], tmp_path / "p.csv", classes=CLASSES)
    assert (tmp_path / "p.csv").read_text() == (
        "path,label,probability,label_2,probability_2,label_3,probability_3,is_unknown,problem\n"
        'b/2.jpg,2,0.7000,10,0.2000,"great, tit",0.1000,false,\n'
        'b/10.jpg,"great, tit",0.5000,10,0.3000,2,0.2000,false,\n'
        "b/11.png,,,,,,,true,truncated\n"
        'b/12.jpg,"great, tit",0.5000,10,0.3000,2,0.2000,true,\n'
    )
    assert [prediction.path for prediction in done.failed] == ["b/11.png"]


def test_a_table_of_two_classes_has_no_third(tmp_path):
    save_predictions([make_prediction("a", (0.4, 0.6), classes=("x", "y"))], tmp_path / "p.csv", classes=("x", "y"))
    assert read_csv(tmp_path / "p.csv") == [
        ["path", "label", "probability", "label_2", "probability_2", "is_unknown", "problem"],
        ["a", "y", "0.6000", "x", "0.4000", "false", ""],
    ]


@pytest.mark.parametrize(
    ("name", "form", "has_sample", "wanted"),
    [
        ("p.csv", None, False, "short"),
        ("p.csv", None, True, "leaderboard"),
        ("p.ZIP", None, False, "leaderboard"),
        ("p.zip", "long", False, "long"),
        ("p.csv", "short", True, "short"),
        ("p.json", "leaderboard", True, "long"),
        ("p.parquet", None, False, "long"),
    ],
)
def test_the_form_follows_the_option_then_the_sample_then_the_ending(tmp_path, name, form, has_sample, wanted):
    assert choose_form(tmp_path / name, form, has_sample=has_sample) == wanted


def test_an_answer_that_is_not_a_number_is_never_sure():
    row = np.full(3, np.nan, np.float32)
    assert Prediction("x", CLASSES, row, "").is_unknown
    assert Prediction("x", CLASSES, row, "").answer.name == ""


def test_the_leaderboard_form_has_names_without_extension_and_labels_by_name(tmp_path):
    done = save_predictions(iter(ROWS), tmp_path / "p.csv", classes=CLASSES, form="leaderboard")
    assert (tmp_path / "p.csv").read_text() == 'image_name,pred_label\n2,2\n10,"great, tit"\n11,\n'
    assert [prediction.path for prediction in done.failed] == ["b/11.png"]


def test_the_zip_holds_the_same_csv_and_equal_predictions_give_equal_zips(tmp_path):
    save_predictions(ROWS, tmp_path / "p.csv", classes=CLASSES, form="leaderboard")
    save_predictions(ROWS, tmp_path / "p.zip", classes=CLASSES, form="leaderboard")
    save_predictions(ROWS, tmp_path / "q.zip", classes=CLASSES, form="leaderboard")
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        assert archive.namelist() == ["prediction.csv"]
        assert archive.read("prediction.csv") == (tmp_path / "p.csv").read_bytes()
    assert (tmp_path / "p.zip").read_bytes() == (tmp_path / "q.zip").read_bytes()


def test_the_long_form_brings_back_every_probability(tmp_path):
    random = np.random.default_rng(0).dirichlet(np.ones(3), size=50).astype(np.float32)
    rows = [make_prediction(f"{n}.jpg", row) for n, row in enumerate(random)]
    save_predictions([*rows, ROWS[2]], tmp_path / "p.csv", classes=CLASSES, form="long")
    header, *lines = read_csv(tmp_path / "p.csv")
    assert header == ["path", "pred_label", "probability", "is_unknown", "problem", "p:2", "p:10", "p:great, tit"]
    assert np.array_equal(np.array([line[5:] for line in lines[:-1]], np.float32), random)
    assert lines[-1] == ["b/11.png", "", "", "true", "truncated", "", "", ""]


def test_with_a_taxonomy_the_long_form_ends_with_the_finest_name_that_is_sure(tmp_path):
    groups = Fallback(("class", "genus"), [["2", "even"], ["10", "even"], ["great, tit", "Parus"]], (0.6, 0.6), ())
    rows = [(0.7, 0.2, 0.1), (0.4, 0.4, 0.2), (0.45, 0.1, 0.45)]
    sent = [replace(make_prediction(f"{n}.jpg", row), threshold=0.6, fallback=groups) for n, row in enumerate(rows)]
    sent.append(replace(ROWS[2], threshold=0.6, fallback=groups))
    for name in ("p.csv", "p.json", "p.parquet"):
        save_predictions(sent, tmp_path / name, classes=CLASSES, form="long", has_groups=True)
    save_predictions(sent, tmp_path / "short.csv", classes=CLASSES, has_groups=True)
    wanted = [("class", "2"), ("genus", "even"), (None, None), (None, None)]
    header, *lines = read_csv(tmp_path / "p.csv")
    assert header[-3:] == ["p:great, tit", "level", "answer"]
    assert [tuple(field or None for field in line[-2:]) for line in lines] == wanted
    assert [line[-2:] for line in read_csv(tmp_path / "short.csv")] == [line[-2:] for line in [header, *lines]]
    content = json.loads((tmp_path / "p.json").read_text())["predictions"]
    assert [(row["level"], row["answer"]) for row in content] == wanted
    table = pq.read_table(tmp_path / "p.parquet")
    assert [(row["level"], row["answer"]) for row in table.to_pylist()] == wanted
    np.testing.assert_array_equal(table["p:great, tit"].to_pylist()[:3], np.float32([0.1, 0.2, 0.45]))


def test_json_and_parquet_hold_the_same_rows(tmp_path):
    save_predictions(ROWS, tmp_path / "p.json", classes=CLASSES, form="long")
    save_predictions(ROWS, tmp_path / "p.parquet", classes=CLASSES, form="long")
    content = json.loads((tmp_path / "p.json").read_text())
    table = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert content["classes"] == list(CLASSES)
    for row, line in zip(content["predictions"], table, strict=True):
        assert (row["path"], row["pred_label"], row["problem"]) == (line["path"], line["pred_label"], line["problem"])
        for name in CLASSES:
            given = None if row["probabilities"] is None else np.float32(row["probabilities"][name])
            assert given == line[f"p:{name}"]
    assert content["predictions"][2]["pred_label"] is None
    assert content["predictions"][2]["probabilities"] is None


@given(
    names=st.lists(st.text(st.characters(exclude_characters="\0/"), min_size=1), min_size=1, max_size=4, unique=True)
)
def test_any_name_comes_back_unharmed(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("names")
    names = [name.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape") for name in names]
    rows = [make_prediction(f"{name}/x.jpg", np.eye(len(names))[k], classes=names) for k, name in enumerate(names)]
    save_predictions(rows, folder / "p.csv", classes=names, form="long")
    header, *lines = read_csv(folder / "p.csv")
    assert [column.removeprefix("p:") for column in header[5:]] == names
    assert [line[1] for line in lines] == names
    assert [line[0] for line in lines] == [f"{name}/x.jpg" for name in names]


def test_names_that_are_not_utf8_are_shown_in_parquet(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    save_predictions([make_prediction(name)], tmp_path / "p.parquet", classes=CLASSES, form="long")
    assert pq.read_table(tmp_path / "p.parquet")["path"].to_pylist() == ["caf\\xe9"]


def test_a_failure_on_the_way_leaves_the_old_file_and_no_part(tmp_path):
    (tmp_path / "p.csv").write_text("old")

    def rows():
        yield ROWS[0]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        save_predictions(rows(), tmp_path / "p.csv", classes=CLASSES, form="long")
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]
    assert (tmp_path / "p.csv").read_text() == "old"


def test_rows_are_written_as_they_come(tmp_path):
    alive = []

    def rows():
        for n in range(20_000):
            alive.append(n)
            yield make_prediction(f"{n}.jpg")

    save_predictions(rows(), tmp_path / "p.parquet", classes=CLASSES, form="long")
    assert pq.ParquetFile(tmp_path / "p.parquet").num_row_groups == 5
    assert len(alive) == 20_000


def test_an_unknown_ending_names_the_known_ones(tmp_path):
    with pytest.raises(PredictionError, match=r"p.xlsx: predictions are written as .csv, .zip, .json, .parquet"):
        save_predictions(ROWS, tmp_path / "p.xlsx", classes=CLASSES, form="long")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"file/p.csv could not be written: "):
        save_predictions(ROWS, tmp_path / "file" / "p.csv", classes=CLASSES, form="long")


def test_two_photos_with_one_name_are_refused_by_both_paths():
    with pytest.raises(PredictionError, match=r"a/1.jpg and b/1.png would both be '1'.*long form"):
        list(leaderboard_names(["a/1.jpg", "b/1.png"]))


def test_a_list_from_windows_gives_the_same_ids():
    assert list(leaderboard_names([r"test\10.jpg", "test/11.jpg"])) == ["10", "11"]
    with pytest.raises(PredictionError, match=r"would both be '1'"):
        list(leaderboard_names([r"a\1.jpg", r"b\1.jpg"]))


def make_sample(path, names, header="image_name,pred_label"):
    path.write_text("\n".join([header, *(f"{name},0" for name in names)]) + "\n")
    return path


def test_a_sample_with_the_same_names_in_the_same_order_passes(tmp_path):
    check_sample(["2", "10"], make_sample(tmp_path / "s.csv", ["2", "10"]))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["2", "10", "11"], r"3 ids are wanted, 2 photos are there; without a photo: '11'"),
        (["2"], r"1 ids are wanted, 2 photos are there; not in the sample: '10'"),
        (["10", "2"], r"another order: row 1 should be '10' and is '2'.*--sample-order"),
        (["2", "10", "2"], r"holds the id '2' twice"),
    ],
)
def test_every_difference_to_the_sample_is_told(tmp_path, wanted, message):
    with pytest.raises(PredictionError, match=message):
        check_sample(["2", "10"], make_sample(tmp_path / "s.csv", wanted))


def test_a_sample_with_another_header_or_none_is_refused(tmp_path):
    with pytest.raises(PredictionError, match=r"starts with 'id,label'; expected 'image_name,pred_label'"):
        check_sample(["2"], make_sample(tmp_path / "s.csv", ["2"], header="id,label"))
    with pytest.raises(PredictionError, match=r"none.csv: does not exist"):
        check_sample(["2"], tmp_path / "none.csv")


def test_a_sample_saved_by_a_spreadsheet_is_read(tmp_path):
    text = "image_name;pred_label\r\n2;0\r\n10;0\r\n"
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "s.csv").write_bytes(text.encode(encoding))
        check_sample(["2", "10"], tmp_path / "s.csv")


def test_rows_can_follow_the_sample(tmp_path):
    sample = make_sample(tmp_path / "s.csv", ["10", "2"])
    paths = in_sample_order(["t/2.jpg", "t/10.jpg"], sample)
    assert paths == ["t/10.jpg", "t/2.jpg"]
    check_sample(list(leaderboard_names(paths)), sample)
