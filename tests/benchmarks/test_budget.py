"""What minutes buy: splits, plans of peers, restarts, and what the results come to; nothing is trained here."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import timm
import torch
from benchmarks.budget import FILL, Cost, Plan
from benchmarks.rivals import Task
from benchmarks.scoreboard import HAND, OURS
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks import budget, labeled, rivals, scoreboard, tables

TASK = Task("timm", "", "", "", "", "", size=112)


def make_photos(folder, counts):
    for label, count in counts.items():
        (folder / label).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((40, 50, 3), (number * 20 % 256, len(label) * 40, 90), np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.jpg")


def make_row(contender, seconds, top1, *, data="birds100", minutes=1.0, seed=0):
    return {
        "contender": contender, "data": data, "minutes": minutes, "seed": seed, "seconds": seconds, "top1": top1,
        "interval": [top1 - 0.03, top1 + 0.03], "photos": 100, "plan": {},
    }  # fmt: skip


@given(st.lists(st.integers(3, 60), min_size=1, max_size=4))
def test_splits_never_overlap_and_lose_no_photo(counts):
    photos = {f"c{n}": [Path(f"c{n}/{i}.jpg") for i in range(count)] for n, count in enumerate(counts)}
    splits = labeled.split_by_chance(photos)
    for label, files in photos.items():
        parts = [splits[split][label] for split in ("train", "val", "test")]
        assert all(parts)
        assert sorted(file for part in parts for file in part) == sorted(files)
    assert splits == labeled.split_by_chance({label: files[::-1] for label, files in photos.items()})


def test_a_ninth_is_held_out():
    train, val = labeled.hold_out({"a": [Path(f"{n}.jpg") for n in range(27)]}, parts=9)
    assert (len(train["a"]), len(val["a"])) == (24, 3)
    assert not set(train["a"]) & set(val["a"])


def test_test_photos_lie_apart_and_their_names_say_nothing(tmp_path):
    make_photos(tmp_path / "signs10", {"one": 20, "two": 20, "three": 20})
    data = labeled.open_data("signs10", tmp_path, tmp_path / "out", classes=2)
    assert data.classes == ["one", "three"]
    assert (data.count("train"), data.count("val"), len(data.truth)) == (32, 4, 4)
    assert [file.name for file in labeled.list_photos(data.photos)] == [f"{n:05d}.jpg" for n in range(4)]
    assert set(data.truth) == {f"{n:05d}.jpg" for n in range(4)}
    used = [file.resolve() for file in (tmp_path / "out").rglob("*.jpg")]
    assert len(used) == len(set(used)) == 40
    assert data.note.startswith("signs10, 2 classes: a fixed draw")


def test_birds_are_tested_on_the_photos_that_the_leaderboard_validates_on(tmp_path):
    make_photos(tmp_path / "birds100/train", {"wren": 18})
    make_photos(tmp_path / "birds100/val", {"wren": 3})
    data = labeled.open_data("birds100", tmp_path, tmp_path / "out")
    assert (data.count("train"), data.count("val"), len(data.truth)) == (16, 2, 3)
    assert {file.resolve().parts[-3] for file in labeled.list_photos(data.photos)} == {"val"}


def test_data_that_is_not_there_is_named(tmp_path):
    with pytest.raises(labeled.DataError, match=r"clothing10/train.*--photos"):
        labeled.open_data("clothing10", tmp_path, tmp_path / "out")


def test_a_photo_without_a_prediction_is_wrong(tmp_path):
    data = labeled.DataSet("d", tmp_path, tmp_path, {"0.jpg": "a", "1.jpg": "b", "2.jpg": "a"}, "")
    task = replace(TASK, out=str(tmp_path / "prediction.csv"))
    rivals.write_predictions(task, [Path("x/0.jpg"), Path("x/1.jpg")], ["a", "a"])
    assert labeled.score(data, tmp_path / "prediction.csv") == 1


@given(
    fixed=st.floats(0, 100), update=st.floats(0.01, 20), frozen=st.floats(0, 20), validation=st.floats(0, 30),
    seconds=st.floats(1, 1000), updates=st.integers(1, 200),
)  # fmt: skip
def test_a_plan_fills_the_time_and_no_more(fixed, update, frozen, validation, seconds, updates):
    cost = Cost(fixed, update, frozen, validation)
    fitted = budget.fit_epochs(cost, seconds, updates=updates)
    least = fixed + update + frozen + validation * (2 if frozen else 1)
    if fitted is None:
        assert least > FILL * seconds - 1e-6
        return
    epochs, each = fitted
    assert 1 <= each <= updates
    spent = fixed + each * (frozen + epochs * update) + validation * ((epochs + 1) if frozen else 1)
    assert spent <= FILL * seconds + 1e-6


def test_a_peer_with_a_frozen_epoch_takes_whole_epochs_where_they_fit_and_else_a_part_of_the_photos():
    cost = Cost(fixed=10, update=1, frozen=0.5, validation=2)
    assert budget.fit_epochs(cost, 200, updates=40) == (3, 40)
    assert budget.fit_epochs(cost, 60, updates=40) == (1, 28)
    assert budget.fit_epochs(cost, 12, updates=40) is None


def test_all_take_their_turn_in_an_order_that_rotates_and_logistic_regression_runs_once():
    plan = Plan(("birds100", "elpv"), (3, 1), 0, (OURS, HAND, "fastai fine_tune @112"), is_small=False)
    races = budget.list_races(plan)
    assert races[0] == ("birds100", 1, 0, OURS)
    assert races[2] == ("birds100", 1, 0, "fastai fine_tune @112")
    assert races[3] == ("elpv", 0.0, 0, HAND)
    assert len(races) == len(set(races)) == 2 * (2 * 3 * 2 + 1)
    assert [race[1] for race in races if race[3] == OURS] == sorted(race[1] for race in races if race[3] == OURS)


def test_long_budgets_have_one_seed_unless_told():
    plan = Plan(("elpv",), (10,), 0, (OURS,), is_small=False)
    assert [race[2] for race in budget.list_races(plan)] == [0]
    assert [race[2] for race in budget.list_races(replace(plan, seeds=2))] == [0, 1]


def test_options_make_the_plan_and_wrong_ones_are_named():
    options = {"is_quick": False, "minutes": "", "data": "", "seeds": 0, "contenders": ""}
    plan = budget.make_plan(**options | {"minutes": "1,0.5", "data": "elpv", "contenders": f"{OURS}+{HAND}"})
    assert (plan.data, plan.minutes, plan.contenders) == (("elpv",), (1, 0.5), (OURS, HAND))
    assert budget.make_plan(**options | {"is_quick": True}) == Plan(("birds100",), (1,), 1, (OURS, HAND), is_small=True)
    with pytest.raises(ValueError, match=r"cats; there are birds100"):
        budget.make_plan(**options | {"data": "cats"})
    with pytest.raises(ValueError, match="larger than 0"):
        budget.make_plan(**options | {"minutes": "0"})


def test_who_cannot_run_is_told_with_the_reason():
    missing = budget.find_missing(list(budget.list_contenders()), timm_script="", autogluon="")
    assert "--timm-script" in missing["timm train.py @112"]
    assert OURS not in missing
    assert HAND not in missing
    assert "--autogluon-python" in missing["AutoGluon"]
    names = ["timm train.py @112", "AutoGluon"]
    assert not budget.find_missing(names, timm_script="train.py", autogluon="autogluon.multimodal 1.6.3")


def test_flags_of_the_script_are_those_of_the_task(tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    flags = rivals.timm_flags(replace(TASK, folder=str(tmp_path), weights="w.pth", epochs=3, updates=5, scratch="s"))
    text = " ".join(flags)
    for part in (
        "--num-classes 1",
        "--input-size 3 112 112",
        "--epochs 3",
        "--train-batches-per-epoch 5",
        "--pretrained",
    ):
        assert part in text
    assert "--train-batches-per-epoch" not in rivals.timm_flags(replace(TASK, folder=str(tmp_path)))


def test_a_task_travels_as_json():
    assert Task(**json.loads(json.dumps(asdict(TASK)))) == TASK


def test_what_is_measured_already_is_not_measured_again_and_failures_are_told():
    rows, asked, saved = [make_row(OURS, 60, 0.9)], [], []

    def race(data, minutes, seed, contender):
        asked.append((seed, contender))
        if seed == 2:
            raise budget.FailedError("no luck")
        return None if seed == 3 else make_row(contender, 61, 0.8, seed=seed)

    races = [("birds100", 1.0, seed, OURS) for seed in range(4)]
    problems = budget.measure(races, rows, {"birds100": "birds100"}, race, lambda: saved.append(len(rows)))
    assert asked == [(1, OURS), (2, OURS), (3, OURS)]
    assert saved == [2]
    assert [problem.rpartition(": ")[2] for problem in problems] == ["no luck", "not one update fits into the time"]


def test_a_late_result_does_not_count_and_one_without_a_budget_counts_above_its_time():
    rows = [
        make_row(OURS, 66.1, 0.9), make_row(OURS, 66.3, 0.95, seed=1),
        make_row(HAND, 100, 0.8, minutes=0), make_row(OURS, 170, 0.91, minutes=3.0),
    ]  # fmt: skip
    assert scoreboard.scores_at(rows, "birds100", 1.0, OURS) == [0.9]
    assert scoreboard.scores_at(rows, "birds100", 1.0, HAND) == []
    assert scoreboard.scores_at(rows, "birds100", 3.0, HAND) == [0.8]
    lines = list(scoreboard.format_table(rows))
    assert lines[0] == "| data |  | 1 min | 3 min | seconds taken |"
    assert lines[2] == "| birds100 | ours | 0.900 (0.870 to 0.930, 1 late) | 0.910 (0.880 to 0.940) | 66, 170 |"
    assert lines[3] == f"| birds100 | {HAND} |  | 0.800 (0.770 to 0.830) | 100 |"


def test_errors_are_held_against_the_best_peer_at_each_budget():
    rows = [
        make_row(contender, 60, top1, data=data)
        for data in ("birds100", "elpv")
        for contender, top1 in ((OURS, 0.9), ("ours, Lite0 alone", 0.99), ("fastai fine_tune @112", 0.8), (HAND, 0.7))
    ]
    record = budget.sign(rows, ["a note"], is_quick=False, load_before=[1.0])
    assert record["ratios"] == {
        "birds100, 1 min: error of the best peer / ours": pytest.approx(2),
        "elpv, 1 min: error of the best peer / ours": pytest.approx(2),
        "mean of 2 data sets, 1 min: error of the best peer / ours": pytest.approx(2),
    }
    assert set(record["targets"].values()) == {1.0, 1.25}
    assert "birds100, 1 min: error of the best peer (fastai fine_tune @112)" in record["measured"]
    text = tables.page([record], {})
    assert "![Accuracy against minutes, one line for each contender](images/budget.svg)" in text
    assert "| elpv | fastai fine_tune @112 | 0.800 (0.770 to 0.830) | 60 |" in text


def test_the_readme_pools_all_photos_and_tells_who_was_late_or_not_measured_on_all():
    rows = [make_row(OURS, 60, top1, data=data) for data, top1 in (("birds100", 0.9), ("elpv", 0.7))]
    rows += [make_row(HAND, 50 if data == "elpv" else 100, 0.6, data=data, minutes=0) for data in ("birds100", "elpv")]
    rows += [make_row("fastai fine_tune @112", 60, 0.8), make_row(OURS, 590, 0.95, minutes=10.0)]
    table = "\n".join(scoreboard.format_summary(rows))
    assert table.splitlines()[0] == "| named right, of 200 test photos of 2 data sets | 1 minute |"
    assert table.splitlines()[2:] == [
        "| Fieldmark | 80.0 % (73.9 to 85.0) |",
        f"| {HAND} | late on 1 of 2 |",
    ]
    page = f"before\n{tables.BEGIN}old\n{tables.END}after\n"
    record = budget.sign(rows, [], is_quick=False, load_before=[1.0])
    assert tables.readme(page, [record]) == f"before\n{tables.BEGIN}{table}\n{tables.END}after\n"
    assert tables.readme(page, []) == page


def test_the_chart_has_a_field_for_each_data_set_and_a_name_for_each_line():
    rows = [
        make_row(contender, 60 * minutes, top1, data=data, minutes=minutes)
        for data in ("birds100", "clothing10", "elpv")
        for contender, minutes, top1 in ((OURS, 1.0, 0.9), (OURS, 3.0, 0.92), ("fastai fine_tune @112", 1.0, 0.8))
    ]
    picture = scoreboard.draw(rows)
    ET.fromstring(picture)
    for word in ("birds100", "clothing10", "elpv", "Fieldmark", "fastai fine_tune @112", "minutes"):
        assert f">{word}<" in picture


def test_commands_are_timed_together_and_a_failure_says_why(tmp_path):
    quiet, failing = [sys.executable, "-c", "pass"], [sys.executable, "-c", "raise SystemExit('no luck')"]
    seconds = budget.run_commands([quiet, quiet], tmp_path, limit_seconds=60)
    assert len(seconds) == 2
    assert all(0 < part < 60 for part in seconds)
    with pytest.raises(budget.FailedError, match="no luck"):
        budget.run_commands([quiet, failing], tmp_path, limit_seconds=60)
    with pytest.raises(budget.FailedError, match="not at its end"):
        budget.run_commands([[sys.executable, "-c", "import time; time.sleep(60)"]], tmp_path, limit_seconds=0.01)


def test_the_trial_of_a_peer_sets_its_epochs_and_is_made_once(tmp_path, monkeypatch):
    make_photos(tmp_path / "signs10", {"one": 90, "two": 90})
    data = labeled.open_data("signs10", tmp_path, tmp_path / "out")
    tasks = []

    def run(commands, place, *, limit_seconds):
        tasks.append(Task(**json.loads(commands[0][-1])))
        rivals.Timings(updates=[2.0, 1.0], counted=8.0).save(str(place))
        rivals.write_predictions(tasks[-1], [Path("00000.jpg")], [data.truth["00000.jpg"]])
        return [20.0]

    monkeypatch.setattr(budget, "run_commands", run)
    monkeypatch.setattr(budget, "save_weights", lambda path: None)
    measuring = budget.Measuring(tmp_path / "runs", {"signs10": data}, timm_script="train.py", device="cpu", cores=2)
    row = measuring.race("signs10", 1.0, 7, "timm train.py @112")
    assert (row["top1"], row["photos"], row["seed"], row["seconds"]) == (1 / 18, 18, 7, 20.0)
    assert row["plan"]["trial"]["fixed"] == 12
    assert [(task.epochs, task.updates, task.seed) for task in tasks] == [(2, 4, 0), (11, 0, 7)]
    assert measuring.race("signs10", 0.2, 7, "timm train.py @112") is None
    assert len(tasks) == 2


def test_a_peer_that_left_much_of_its_time_unused_runs_once_more_by_what_it_cost(tmp_path, monkeypatch):
    make_photos(tmp_path / "signs10", {"one": 90, "two": 90})
    data = labeled.open_data("signs10", tmp_path, tmp_path / "out")
    tasks, speed = [], iter([4.0, 1.0, 1.0])

    def run(commands, place, *, limit_seconds):
        tasks.append(Task(**json.loads(commands[0][-1])))
        update = next(speed)
        counted = tasks[-1].epochs * (tasks[-1].updates or 4) * update
        rivals.Timings(updates=[update], counted=counted).save(str(place))
        rivals.write_predictions(tasks[-1], [], [])
        return [10 + counted]

    monkeypatch.setattr(budget, "run_commands", run)
    monkeypatch.setattr(budget, "save_weights", lambda path: None)
    measuring = budget.Measuring(tmp_path / "runs", {"signs10": data}, timm_script="train.py", device="cpu", cores=2)
    row = measuring.race("signs10", 1.0, 0, "timm train.py @112")
    assert [task.epochs for task in tasks] == [2, 3, 11]
    assert row["plan"]["trial"]["update"] == 1
    assert 0.8 * 60 <= row["seconds"] <= 60


def test_ours_is_two_commands_that_keep_the_budget_together(tmp_path, monkeypatch):
    make_photos(tmp_path / "signs10", {"one": 20})
    data, seen = labeled.open_data("signs10", tmp_path, tmp_path / "out"), []

    def run(commands, place, *, limit_seconds):
        seen.extend(commands)
        rivals.write_predictions(replace(TASK, out=str(place / "prediction.csv")), [], [])
        return [50.0, 9.0]

    monkeypatch.setattr(budget, "run_commands", run)
    measuring = budget.Measuring(tmp_path / "runs", {"signs10": data}, timm_script="", device="cpu", cores=2)
    row = measuring.race("signs10", 1.0, 0, "ours, Lite0 alone")
    assert (row["top1"], row["seconds"], row["plan"]["seconds"]) == (0, 59, [50, 9])
    assert [command[3] for command in seen] == ["train", "predict"]
    assert float(seen[0][seen[0].index("--minutes") + 1]) == pytest.approx((60 - 10.1) / 60, abs=1e-3)
    assert "model.weights=package:efficientnet-lite0" in seen[0]


def test_the_command_writes_a_record_and_a_second_call_measures_nothing(tmp_path, monkeypatch, capsys):
    make_photos(tmp_path / "signs10", {"one": 20, "two": 20})
    asked = []

    def race(self, data, minutes, seed, contender):
        asked.append(contender)
        return make_row(contender, 30, 0.75, data=data, minutes=0 if contender == HAND else minutes)

    monkeypatch.setattr(budget.Measuring, "race", race)
    file = tmp_path / "budget.json"
    command = ["budget", "--json", str(file), "--photos", str(tmp_path), "--minutes", "1", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--data", "signs10,clothing10", "--contenders", f"{OURS}+{HAND}"])
    budget.main()
    assert asked == [OURS, HAND]
    record = json.loads(file.read_text(encoding="utf-8"))
    assert [row["contender"] for row in record["rows"]] == asked
    assert record["hardware"]["cores"] >= 1
    assert any(note.startswith("clothing10 was left out") for note in record["notes"])
    assert "| signs10 | ours | 0.750 (0.720 to 0.780) | 30 |" in capsys.readouterr().out
    budget.main()
    assert len(asked) == 2
    record["hardware"]["processor"] = "another"
    file.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        budget.main()
    assert "another machine" in capsys.readouterr().err


def test_autogluon_runs_by_its_own_interpreter_for_as_long_as_its_start_and_end_leave(tmp_path, monkeypatch):
    make_photos(tmp_path / "signs10", {"one": 20})
    data = labeled.open_data("signs10", tmp_path, tmp_path / "out")
    tasks, beyond = [], iter([12.0, 30.0, 20.0])

    def run(commands, place, *, limit_seconds):
        assert commands[0][:3] == ["/its/python", "-m", "benchmarks.rivals"]
        tasks.append(Task(**json.loads(commands[0][-1])))
        rivals.Timings(counted=tasks[-1].seconds).save(str(place))
        rivals.write_predictions(tasks[-1], [], [])
        return [tasks[-1].seconds + next(beyond)]

    monkeypatch.setattr(budget, "run_commands", run)
    monkeypatch.setattr(budget, "save_weights", lambda path: None)
    folder = tmp_path / "runs"
    measuring = budget.Measuring(
        folder, {"signs10": data}, timm_script="", device="cpu", cores=2, autogluon_python="/its/python"
    )
    row = measuring.race("signs10", 1.0, 3, "AutoGluon")
    assert [task.seconds for task in tasks] == [budget.TRIAL_SECONDS, 45, 27]
    assert (row["seconds"], row["plan"]["time_limit"], tasks[-1].seed) == (47, 27, 3)
    assert measuring.race("signs10", 0.5, 3, "AutoGluon") is None


def test_a_python_without_autogluon_is_told_from_one_with_it(tmp_path):
    assert budget.ask_autogluon(str(tmp_path / "no-such-python")) == ""
    packages = tmp_path / "python"
    packages.write_text("#!/bin/sh\necho autogluon.multimodal 1.6.3, torch 2.13.0, timm 1.0.3\n", encoding="utf-8")
    packages.chmod(0o755)
    assert budget.ask_autogluon(str(packages)) == "autogluon.multimodal 1.6.3, torch 2.13.0, timm 1.0.3"


def test_autogluon_is_given_the_weights_in_its_own_form(tmp_path):
    model = timm.create_model(rivals.MODEL)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    folder = rivals.write_autogluon_checkpoint(tmp_path / "weights.pth", tmp_path / "lite0")
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    body = timm.create_model(about["architecture"], num_classes=0, checkpoint_path=str(folder / "pytorch_model.bin"))
    assert about["num_features"] == body.num_features
    assert about["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in body.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scikit-learn", "fastai"])
def test_a_peer_learns_and_writes_a_row_for_each_photo(kind, tmp_path):
    if kind == "fastai":
        pytest.importorskip("fastai", reason="slow")
    make_photos(tmp_path / "signs10", {"one": 30, "two": 30})
    data = labeled.open_data("signs10", tmp_path, tmp_path / "out")
    measuring = budget.Measuring(tmp_path / "runs", {"signs10": data}, timm_script="", device="cpu", cores=2)
    task = replace(TASK, kind=kind, size=64, updates=1)
    _, place = measuring.run_peer(task, data)
    with (place / "prediction.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == sorted(data.truth)
    assert {row["label"] for row in rows} <= {"one", "two"}
