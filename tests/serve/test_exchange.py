"""Laws of the exchange with other tools: they are told in their form, and what they decide comes back unchanged."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
from typer.testing import CliRunner

from fieldmark.cli.app import app
from fieldmark.errors import DataError
from fieldmark.runs.folder import Run
from fieldmark.serve.exchange import export_decisions, import_decisions
from fieldmark.serve.review import Corrections

CLASSES = ("auk", 'bee-eater & "co"', "crane", "dipper")
PHOTOS = ["a b/1.jpg", "a b/2.jpg", "ü/3.png", "ü/4.png", "c/5.jpg", "c/\udcff.jpg", "d/7.jpg", "d/8.jpg"]


@pytest.fixture
def runs(make_run):
    return [Run(make_run("run", classes=CLASSES, per_class=2, photos=PHOTOS))]


@pytest.fixture
def table(tmp_path):
    corrections = Corrections(tmp_path / "corrections.csv")
    corrections.decide("a b/1.jpg", "relabel", "crane")
    corrections.decide("ü/3.png", "drop", "")
    corrections.decide("c/\udcff.jpg", "relabel", "auk")
    corrections.decide("d/7.jpg", "keep", "")
    return corrections.file


def read(path):
    return json.loads(path.read_text())


def test_decisions_go_to_label_studio_and_come_back(runs, table, tmp_path):
    files = export_decisions(runs, table, tmp_path / "tasks.json", form="label-studio")
    assert [file.name for file in files] == ["tasks.json", "tasks.xml"]
    tasks = {task["data"]["path"]: task for task in read(files[0])}
    assert list(tasks) == PHOTOS
    assert tasks["a b/1.jpg"]["data"]["image"] == "/data/local-files/?d=a%20b/1.jpg"
    [prediction] = tasks["a b/1.jpg"]["predictions"]
    assert prediction["score"] == pytest.approx(0.7)
    [result] = prediction["result"]
    assert result["value"]["choices"][0] in CLASSES
    interface = ET.fromstring(files[1].read_text())
    controls = {one.get("name"): one for one in interface.iter("Choices")}
    assert [choice.get("value") for choice in controls["choice"]] == list(CLASSES)
    assert result["from_name"] in controls
    assert result["to_name"] == interface.find("Image").get("name") == controls["choice"].get("toName")
    assert "annotations" not in tasks["d/8.jpg"]
    fresh = tmp_path / "fresh.csv"
    assert import_decisions(runs, fresh, files[0]) == 4
    assert Corrections(fresh).decisions == Corrections(table).decisions


def test_decisions_go_to_fiftyone_and_come_back(runs, table, tmp_path):
    labels, predictions = export_decisions(runs, table, tmp_path / "labels.json", form="fiftyone")
    content = read(labels)
    assert content["classes"] == list(CLASSES)
    assert content["labels"]["a b/1"] == 2
    assert content["labels"]["ü/3"] is None
    assert content["labels"]["d/8"] == 3
    found = read(predictions)["labels"]["d/8"]
    assert set(found) == {"label", "confidence"}
    assert 0 <= found["label"] < 4
    assert import_decisions(runs, tmp_path / "fresh.csv", labels) == 3
    kept = {path: one for path, one in Corrections(table).decisions.items() if one.action != "keep"}
    assert Corrections(tmp_path / "fresh.csv").decisions == kept


def test_what_people_chose_elsewhere_is_taken(runs, tmp_path):
    """Tasks that were made by hand have no path of ours; a skipped one decides nothing; the own label keeps."""
    choice = {"from_name": "bird", "to_name": "image", "type": "choices", "value": {"choices": ["crane"]}}
    tasks = [
        {"data": {"image": "/data/local-files/?d=a%20b/2.jpg"}, "annotations": [{"result": [choice]}]},
        {"data": {"path": "c/5.jpg"}, "annotations": [{"result": [choice], "was_cancelled": False}]},
        {"data": {"path": "d/7.jpg"}, "annotations": [{"result": [choice], "was_cancelled": True}]},
        {"data": {"path": "d/8.jpg"}, "annotations": [], "predictions": [{"result": [choice]}]},
    ]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    table = tmp_path / "c.csv"
    import_decisions(runs, table, tmp_path / "tasks.json")
    assert table.read_text().splitlines()[1:] == ["a b/2.jpg,relabel,crane", "c/5.jpg,keep,"]
    (tmp_path / "labels.json").write_text(
        json.dumps({"classes": list(CLASSES), "labels": {"d/7": "auk", "d/8": {"label": 0, "confidence": 1.0}}})
    )
    import_decisions(runs, table, tmp_path / "labels.json")
    assert table.read_text().splitlines()[3:] == ["d/7.jpg,relabel,auk", "d/8.jpg,relabel,auk"]


def annotated(path, *choices):
    results = [{"from_name": "choice", "value": {"choices": list(choices)}}]
    return {"data": {"path": path}, "annotations": [{"result": results}]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("no JSON", "is in another form (JSONDecodeError"),
        ("7", "is in another form (ValueError has 7"),
        ([{"image": "a b/1.jpg", "choice": "auk"}], "JSON-MIN"),
        ([annotated("a b/9.jpg", "auk")], "there is no photo 'a b/9.jpg' in"),
        ([annotated("a b/1.jpg", "crain")], "'crain', which is not a class; did you mean 'crane'?"),
        ([annotated("a b/1.jpg", "auk", "crane")], "task 1: 'a b/1.jpg' has the choices ['auk', 'crane']. Leave one"),
        ([annotated("a b/1.jpg", "dipper"), annotated("a b/1.jpg", "crane")], "two decisions about 'a b/1.jpg'"),
        ([{"data": {}, "annotations": []}], "is in another form (KeyError 'image')"),
        ({"classes": ["auk"], "labels": {"a b/9": 0}}, "there is no photo 'a b/9'"),
        ({"classes": ["auk"], "labels": {"d/8": 4}}, "is in another form (IndexError"),
        ({"classes": ["emu"], "labels": {"d/8": 0}}, "'emu', which is not a class"),
        ({"classes": "auk", "labels": {}}, "is in another form (ValueError has classes = 'auk'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_whole(runs, table, tmp_path, content, reason):
    file, before = tmp_path / "given.json", table.read_bytes()
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError) as error:
        import_decisions(runs, table, file)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert table.read_bytes() == before


@pytest.mark.parametrize("form", ["label-studio", "fiftyone"])
def test_a_label_that_an_earlier_decision_gave_stays_that_decision(form, runs, tmp_path):
    table = tmp_path / "c.csv"
    Corrections(table).decide("c/5.jpg", "relabel", "crane")  # which the run was trained with: it is its own label now
    file, _ = export_decisions(runs, table, tmp_path / "out.json", form=form)
    import_decisions(runs, table, file)
    assert Corrections(table).decisions["c/5.jpg"] == ("relabel", "crane")


def test_fiftyone_can_take_a_decision_back(runs, tmp_path):
    table = tmp_path / "c.csv"
    Corrections(table).decide("c/5.jpg", "relabel", "auk")
    Corrections(table).decide("d/7.jpg", "drop", "")
    (tmp_path / "labels.json").write_text(json.dumps({"classes": CLASSES, "labels": {"c/5": 2, "d/7": 3, "d/8": 3}}))
    assert import_decisions(runs, table, tmp_path / "labels.json") == 2
    assert Corrections(table).decisions == {"c/5.jpg": ("keep", ""), "d/7.jpg": ("keep", "")}


def test_photos_that_fiftyone_cannot_tell_apart_are_refused(make_run, tmp_path):
    run = Run(make_run("run", classes=CLASSES[:2], per_class=1, photos=["a/1.jpg", "a/1.png"]))
    with pytest.raises(DataError, match="2 photos are named"):
        export_decisions([run], tmp_path / "c.csv", tmp_path / "labels.json", form="fiftyone")
    assert not (tmp_path / "labels.json").exists()


def test_decisions_of_a_photo_that_fiftyone_cannot_tell_from_another_are_refused(make_run, tmp_path):
    run = Run(make_run("one", classes=CLASSES[:2], per_class=2, photos=["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"]))
    table = (run.path / "split.csv").read_text()
    (run.path / "split.csv").write_text(table.rstrip("\n") + "\na/1.png,a,train,\n")
    (tmp_path / "labels.json").write_text(json.dumps({"classes": CLASSES[:2], "labels": {"a/1": 1}}))
    with pytest.raises(DataError, match="2 photos are named 'a/1'"):
        import_decisions([run], tmp_path / "c.csv", tmp_path / "labels.json")


def test_the_command_line_writes_and_takes_files(runs, table, tmp_path):
    run, out = str(runs[0].path), str(tmp_path / "out.json")

    def call(*words):
        return CliRunner().invoke(app, ["review", run, *words])

    assert call("--export", out).output == f"wrote {out}, {tmp_path / 'out.xml'}\n"
    fresh = str(tmp_path / "fresh.csv")
    assert call("--import", out, "--out", fresh).output == f"took 4 decisions from {out} into {fresh}\n"
    assert call("--import", out, "--export", out).exit_code == 2
    missing = call("--import", str(tmp_path / "missing.json"))
    assert isinstance(missing.exception, DataError)
