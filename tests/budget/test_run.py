"""A budget from the first photo to the run folder, with a network so small that the clock may be invented."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from fieldmark.budget import run as budget
from fieldmark.budget.candidates import Candidate, find_backbones, list_candidates
from fieldmark.budget.plan import EPOCHS, Plan
from fieldmark.budget.race import Features, best_average, chunk_size
from fieldmark.budget.shelf import Answer
from fieldmark.budget.team import StoppedError, Team
from fieldmark.budget.tune import Option, count_passes, open_pool, tuning_config
from fieldmark.config import Config, load_config
from fieldmark.errors import ConfigError, DataError, ExportError, InterruptedRunError, PredictionError, RunError
from fieldmark.export.export import export_run
from fieldmark.inference.evaluation import evaluate
from fieldmark.inference.predict import _training_prior
from fieldmark.inference.predictor import Predictor
from fieldmark.progress import Quiet
from fieldmark.runs.folder import Run
from fieldmark.runs.session import setup_fabric
from fieldmark.runs.train import StopRequest

COLORS = {"red": (200, 60, 50), "green": (50, 170, 70), "blue": (60, 70, 200)}
TINY = ["model.name=test_resnet", "model.weights=random", "eval.size=32", "augment.size=32", "cache.mode=off",
        "loader.workers=0", "train.threads=1", "train.batch_size=8"]  # fmt: skip


class TickClock:
    """A clock that goes on by a fixed step whenever it is read."""

    def __init__(self, step: float = 0.02) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class Lines:
    """Progress that keeps its messages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, total: int, done: int) -> None:
        pass

    def advance(self, n: int) -> None:
        pass

    def message(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "photos"
    for number, (name, color) in enumerate(COLORS.items()):
        for place in range(8):
            path = root / name / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(100 * number + place).normal(color, 60, (36, 48, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def settings(photos) -> Config:
    return load_config(None, [f'data.path="{photos.as_posix()}"', *TINY])


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    budget.train_within(settings, out, minutes=0.2, clock=TickClock())
    return out


def prepare(config: Config, path: Path) -> budget._Work:
    team = Team(setup_fabric(config)[0], StopRequest())
    return budget._prepare(config, path, Plan(path / "plan.jsonl", 60), Quiet(), team)


def find_weights(run: Path) -> dict[str, dict[str, np.ndarray]]:
    return {str(path.relative_to(run)): load_file(path) for path in sorted(run.rglob("best.safetensors"))}


def assert_same_weights(first: Path, second: Path) -> None:
    ours, theirs = find_weights(first), find_weights(second)
    assert ours.keys() == theirs.keys()
    for name in ours:
        for tensor in ours[name]:
            np.testing.assert_array_equal(ours[name][tensor], theirs[name][tensor], err_msg=f"{name} {tensor}")


def test_the_folder_answers_as_an_ordinary_run_and_says_what_was_tried(finished, photos):
    run = Run(finished)
    assert run.summary["status"] == "finished"
    assert Predictor.load(run)(photos / "red" / "0.png").label == "red"
    tried = [row["what"] for row in run.summary["tried"]]
    assert any("fine-tuning" in what for what in tried)
    assert any(what.startswith("test_resnet-32-whole") for what in tried)
    assert {"top1", "top1_interval", "optimistic_bias", "more_time"} <= run.summary["val"].keys()
    assert not (finished / "features").exists()
    assert not (finished / "tuning").exists()
    assert "validation: top-1" in budget.format_result(run)


def test_a_plan_that_is_repeated_gives_the_same_weights(finished, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    shutil.copyfile(finished / "plan.jsonl", again / "plan.jsonl")
    # Another machine: every reading of its clock takes five times as long.
    budget.resume_within(again, minutes=None, clock=TickClock(0.1))
    assert_same_weights(finished, again)
    assert (again / "plan.jsonl").read_text() == (finished / "plan.jsonl").read_text()


class _KilledError(BaseException):
    """The process ends here."""


def read_decisions(run: Path) -> list[tuple[str, object]]:
    records = map(json.loads, (run / "plan.jsonl").read_text().splitlines())
    return [(record["what"], record["value"]) for record in records]


SLOW = pytest.mark.slow


@pytest.mark.parametrize("share", [*(pytest.param(share, marks=SLOW) for share in (0.2, 0.4, 0.6, 0.95)), 0.8])
def test_a_run_that_is_killed_answers_and_resumes_to_the_same_weights(share, settings, finished, tmp_path, monkeypatch):
    out = tmp_path / "killed"
    last = int(share * len(read_decisions(finished)))
    append = Plan._append

    def append_or_die(plan: Plan, record: dict) -> None:
        if len(plan._recorded) == last:
            raise _KilledError
        append(plan, record)

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "_append", append_or_die)
        with pytest.raises(_KilledError):
            budget.train_within(settings, out, minutes=0.2, clock=TickClock())
    if (out / "ensemble.json").is_file():
        assert Predictor.load(out).classes == ("blue", "green", "red")

    # What is left of the record is the whole run's: repeat that, so that the clock decides alike.
    shutil.copyfile(finished / "plan.jsonl", out / "plan.jsonl")
    budget.resume_within(out, minutes=None, clock=TickClock())
    assert_same_weights(finished, out)


def test_time_for_two_backbones_is_shared_and_a_killed_second_one_goes_on(settings, tmp_path, monkeypatch):
    others = load_config(None, ["model.name=test_efficientnet", "model.weights=random", "eval.size=32"])
    monkeypatch.setattr(budget, "find_backbones", lambda _: [*find_backbones(settings), *find_backbones(others)])
    whole = budget.train_within(settings, tmp_path / "whole", minutes=0.4, clock=TickClock())
    tried = [row["what"] for row in whole.summary["tried"]]
    assert {what.split("-32")[0] for what in tried if what.startswith("fine-tuning of ")} == {
        "fine-tuning of test_resnet",
        "fine-tuning of test_efficientnet",
    }
    assert len(tried) == len(set(tried))
    assert any(what.startswith("the average of ") and what.count("-tuned-") == 2 for what in tried)

    out, chosen = tmp_path / "killed", []
    choose = budget._Work._choose

    def choose_or_die(work, *given) -> None:
        choose(work, *given)
        chosen.append(work.best.name)
        if len(chosen) == 2:
            raise _KilledError

    with monkeypatch.context() as patch:
        patch.setattr(budget._Work, "_choose", choose_or_die)
        with pytest.raises(_KilledError):
            budget.train_within(settings, out, minutes=0.4, clock=TickClock())
    shutil.copyfile(whole.path / "plan.jsonl", out / "plan.jsonl")
    budget.resume_within(out, minutes=None, clock=TickClock())
    assert_same_weights(whole.path, out)


def test_time_that_a_short_race_leaves_goes_to_fine_tuning(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(budget._Work, "may_tune", lambda work: setattr(work, "epochs", 4.0))
    run = budget.train_within(settings, tmp_path / "left", minutes=0.4, clock=TickClock())
    assert any(row["what"].startswith("fine-tuning of ") for row in run.summary["tried"])
    assert '"time for epochs is left", "value": true' in (run.path / "plan.jsonl").read_text()


def test_fine_tuning_that_leaves_no_time_to_look_at_it_keeps_the_probe(settings, tmp_path, monkeypatch):
    tune = budget.tuning.tune
    monkeypatch.setattr(budget.tuning, "tune", lambda *given, **more: replace(tune(*given, **more), networks={}))
    run = budget.train_within(settings, tmp_path / "late", minutes=0.2, clock=TickClock())
    assert run.summary["status"] == "finished"
    assert any(row["what"].startswith("fine-tuning of ") for row in run.summary["tried"])
    assert not any("fine-tuned (" in row["what"] for row in run.summary["tried"])


@pytest.mark.parametrize("after", [20, 40, 60])
def test_a_signal_leaves_the_best_so_far_and_says_what_it_is(after, settings, tmp_path, monkeypatch):
    out = tmp_path / "stopped"

    class LateStop(StopRequest):
        asked = 0

        def __bool__(self) -> bool:
            self.asked += 1
            return self.asked > after

    @contextmanager
    def stop_late():
        yield LateStop("SIGINT")

    monkeypatch.setattr(budget, "stop_requests", stop_late)
    with pytest.raises(InterruptedRunError, match=r"stopped by SIGINT: .* holds .*, which answers. Go on with"):
        budget.train_within(settings, out, minutes=1, clock=TickClock(0.001))
    assert Run(out).summary["status"] == "interrupted"
    assert "more_time" in Run(out).summary["val"]
    assert Predictor.load(out).classes == ("blue", "green", "red")

    monkeypatch.undo()
    resumed = budget.resume_within(out, minutes=0.2, clock=TickClock())
    assert resumed.summary["status"] == "finished"
    assert "validation: top-1" in budget.format_result(resumed)
    assert "more time" not in budget.format_result(resumed)


def test_a_deadline_shorter_than_the_floor_gives_the_floor_and_says_so(settings, tmp_path):
    progress = Lines()
    run = budget.train_within(settings, tmp_path / "short", minutes=0.001, progress=progress)
    assert run.summary["status"] == "finished"
    assert any("were over before the least that answers was made" in line for line in progress.lines)
    assert Predictor.load(run).classes == ("blue", "green", "red")


def copy_photos(photos: Path, root: Path) -> Config:
    shutil.copytree(photos, root)
    return load_config(None, [f'data.path="{root.as_posix()}"', *TINY])


def test_a_budget_goes_on_with_the_photos_that_it_began_with_alone(photos, tmp_path):
    config = copy_photos(photos, tmp_path / "photos")
    run = budget.train_within(config, tmp_path / "run", minutes=0.03, clock=TickClock())
    before = find_weights(run.path)
    (tmp_path / "photos" / "blue").rename(tmp_path / "photos" / "zaffre")  # which moves the numbers of all photos
    with pytest.raises(DataError, match=r"are not those that .* began with"):
        budget.resume_within(run.path, minutes=0.4, clock=TickClock())
    assert find_weights(run.path).keys() == before.keys()
    assert Run(run.path).classes == ("blue", "green", "red")


def test_a_member_of_the_same_name_with_other_weights_is_another_member(settings, tmp_path):
    work = prepare(settings, tmp_path)
    work.shelf.open(settings)
    work.floor()
    (first,) = work.best.members
    other = replace(first, weights={**first.weights, "head.bias": first.weights["head.bias"] + 1})
    (tmp_path / "predictions" / "test.parquet").write_bytes(b"of the first")
    work.shelf.put(Answer("both", (first, other)))
    assert not (tmp_path / "predictions" / "test.parquet").exists()
    for model, member in zip((first, other), Run(tmp_path).members, strict=True):
        stored = load_file(member.path / "best.safetensors")["head.bias"]
        np.testing.assert_array_equal(stored, model.weights["head.bias"].numpy())
    found = work.shelf.load()
    assert found.keys == [first.key, first.key]
    np.testing.assert_array_equal(found.val, Answer("both", (first, other)).val)


def test_a_run_that_goes_on_keeps_its_model_until_a_better_one_is_there(settings, finished, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    # A floor, and no more: the old answer is better, and stays whole.
    floor = budget._Work.floor

    def stop_after(work: budget._Work) -> None:
        floor(work)
        raise StoppedError

    monkeypatch.setattr(budget._Work, "floor", stop_after)
    monkeypatch.setattr(budget._Work, "_loss", lambda work, answer: 0.0 if answer is work.standing else 1.0)
    kept = Run(copy).summary["kept"]
    with pytest.raises(InterruptedRunError, match=f"holds {re.escape(kept)}, which answers"):
        budget.resume_within(copy, minutes=0.3, clock=TickClock())
    assert_same_weights(finished, copy)
    for name in ("calibration.json", "recipe.toml", "predictions/val.parquet"):
        assert (copy / name).read_bytes() == (finished / name).read_bytes()
    ours, theirs = Run(copy).summary, Run(finished).summary
    assert (ours["kept"], ours["val"]["top1"]) == (theirs["kept"], theirs["val"]["top1"])


def test_each_of_several_networks_is_a_run_inside_that_exports(photos, tmp_path):
    config = copy_photos(photos, tmp_path / "photos")
    work = prepare(config, tmp_path / "run")
    work.shelf.open(config)
    work.floor()
    (first,) = work.best.members
    other = replace(first, key="other", weights={**first.weights, "head.bias": first.weights["head.bias"] + 1})
    work.shelf.settle(Answer("both", (first, other)))
    run = Run(tmp_path / "run")
    options = {"to": "torch", "is_int8": False, "max_accuracy_loss": 0.01, "max_photos": 4}
    with pytest.raises(ExportError, match=r"export the best of them by `fieldmark export .*members.*top-1 .*members"):
        export_run(run, tmp_path / "export", **options)
    member = run.members[1]
    written = export_run(member, tmp_path / "export", **options)
    assert written.metrics["val"]["top1"] == member.summary["val"]["top1"]
    own, exported = (
        Predictor.load(model).predict_proba(member.split.files()[:6]) for model in (member, tmp_path / "export")
    )
    np.testing.assert_allclose(own, exported, atol=1e-4 if member.model_info["precision"] == "32-true" else 0.05)


def test_heads_learn_from_the_validation_photos_at_the_end_where_that_is_asked_for(photos, tmp_path):
    runs = []
    for number, more in enumerate(([], ["data.train_on=train+val", "train.select=last"])):
        config = load_config(None, [f'data.path="{photos.as_posix()}"', *TINY, *more])
        runs.append(budget.train_within(config, tmp_path / str(number), minutes=0.001, clock=TickClock()))
    without, refitted = (load_file(run.path / "best.safetensors") for run in runs)
    assert "heads fitted on train+val" in runs[1].summary["kept"]
    assert not np.array_equal(without["head.weight"], refitted["head.weight"])
    backbone = next(name for name in without if name.startswith("backbone."))
    np.testing.assert_array_equal(without[backbone], refitted[backbone])
    # The accuracy that is stated is that of heads that have not seen the photos.
    assert runs[0].summary["val"]["top1"] == runs[1].summary["val"]["top1"]
    with pytest.raises(RunError, match="its validation photos are no test of it"):
        evaluate(runs[1].path, split="val")


def test_class_weights_within_a_budget_divide_out_the_class_shares(photos, tmp_path):
    few = tmp_path / "photos"
    for number, folder in enumerate(sorted(path for path in photos.iterdir() if path.is_dir())):
        (few / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[: None if number else 5]:
            shutil.copy(file, few / folder.name)
    runs = []
    for kind in ("none", "balanced"):
        config = load_config(None, [f'data.path="{few.as_posix()}"', *TINY, f"train.class_weights={kind}"])
        runs.append(budget.train_within(config, tmp_path / kind, minutes=0.2, clock=TickClock()))
    plain, balanced = runs
    assert "class shares of training divided out" in balanced.summary["kept"]
    prior = plain.prior
    assert prior.max() > 1.5 * prior.min()
    for one, other in zip(plain.members, balanced.members, strict=True):
        before, after = (load_file(run.path / "best.safetensors")["head.bias"] for run in (one, other))
        moved = (before - after) / np.log(prior)
        np.testing.assert_allclose(moved, moved[0], rtol=1e-3)  # the temperature, the same for all classes
        assert (one.config.train.class_weights, other.config.train.class_weights) == ("none", "balanced")
    with pytest.raises(PredictionError, match="do not assume the class shares of training"):
        _training_prior(balanced.path)


def test_two_sets_of_weights_of_one_architecture_give_their_own_features(settings, tmp_path):
    course = prepare(settings, tmp_path).course
    (first,) = find_backbones(settings)
    weights = course.load_model(Candidate(first, 32, "whole")).model.backbone.state_dict()
    doubled = {name: tensor.numpy() for name, tensor in weights.items()}
    doubled["bn1.weight"] = 2 * doubled["bn1.weight"]
    save_file(doubled, tmp_path / "other.safetensors")
    second = replace(first, weights=str(tmp_path / "other.safetensors"))
    values = [
        course.collect_features(Candidate(backbone, 32, "whole"), course.order[:4]).values
        for backbone in (first, second)
    ]
    assert not np.allclose(*values)


def test_fine_tuning_keeps_the_micro_batch_that_is_asked_for_and_leaves_moving_statistics_their_batch(photos):
    def tuned(*more):
        config = load_config(None, [f'data.path="{photos.as_posix()}"', *TINY, "train.device=cpu", *more])
        (backbone,) = find_backbones(config)
        return tuning_config(config, Candidate(backbone, 32, "whole"), Option(32, 0, 0.1, 6.0)).train.micro_batch_size

    assert tuned("train.micro_batch_size=3") == 3
    assert tuned("model.freeze_batchnorm=false") is None


@pytest.mark.parametrize(
    ("cores", "batch", "photos_of_a_pass", "passes"),
    [(1, 32, 16, None), (2, 32, 16, [2, 1]), (3, 32, 11, [3, 1]), (4, 32, 8, [4, 1]), (16, 32, 8, [4, 4]),
     (16, 128, 8, [16, 1]), (8, 4, 4, [1, 8]), (5, 32, 7, [5, 1]), (6, 32, 11, [3, 2]), (7, 32, 5, [7, 1]),
     (10, 32, 7, [5, 2]), (11, 32, 7, [5, 2]), (13, 32, 8, [4, 3])],
)  # fmt: skip
def test_the_passes_of_an_update_share_all_cores(photos, monkeypatch, cores, batch, photos_of_a_pass, passes):
    config = load_config(None, [f'data.path="{photos.as_posix()}"', *TINY, f"train.batch_size={batch}"])
    monkeypatch.setattr("torch.get_num_threads", lambda: cores)
    (backbone,) = find_backbones(config)
    tuned = tuning_config(config, Candidate(backbone, 32, "whole"), Option(32, 0, 0.1, 6.0))
    assert tuned.train.micro_batch_size == photos_of_a_pass
    dropping = config.model_copy(update={"model": config.model.model_copy(update={"drop_path": 0.1})})
    assert count_passes(dropping) == 1
    course = SimpleNamespace(team=SimpleNamespace(fabric=SimpleNamespace(device=torch.device("cpu"), world_size=1)))
    with open_pool(course, tuned) as pool:
        assert (pool and [pool._max_workers, *pool._initargs]) == passes


@pytest.mark.parametrize(("cores", "photos_at_a_time"), [(2, 64), (8, 64), (32, 256)])
def test_features_are_computed_in_whole_passes_on_every_core(monkeypatch, cores, photos_at_a_time):
    monkeypatch.setattr("fieldmark.budget.race.usable_cores", lambda: cores)
    assert chunk_size("cpu") == photos_at_a_time
    assert chunk_size("cuda") == 64  # one batch, whatever the processor


def test_fine_tuning_refuses_a_batch_that_batchnorm_learns_nothing_from(photos, tmp_path):
    single = [one for one in TINY if "batch_size" not in one]
    given = [f'data.path="{photos.as_posix()}"', *single, "train.batch_size=1", "model.freeze_batchnorm=false"]
    with pytest.raises(ConfigError, match=r"train.batch_size is 1: BatchNorm learns nothing from one photo.*Raise it"):
        budget.train_within(load_config(None, given), tmp_path / "single", minutes=2, clock=TickClock())


def test_broken_photos_that_are_left_out_are_listed(settings, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "red" / "torn.png").write_bytes(b"no photo")
    data = settings.data.model_copy(update={"path": str(tmp_path / "photos"), "broken": "skip"})
    run = budget.train_within(settings.model_copy(update={"data": data}), tmp_path / "run", minutes=0.001)
    assert "red/torn.png" in (run.path / "broken.csv").read_text()


def test_a_finished_run_goes_on_with_new_minutes_and_not_without(finished, tmp_path):
    copy = tmp_path / "more"
    shutil.copytree(finished, copy)
    with pytest.raises(RunError, match=r"is finished. Give it more time with: .*--minutes N"):
        budget.resume_within(copy, minutes=None)
    assert budget.resume_within(copy, minutes=0.2, clock=TickClock()).summary["status"] == "finished"


def test_a_finished_run_with_new_minutes_does_what_there_was_no_time_for(settings, tmp_path):
    def find_tuned(run: Run) -> list[str]:
        return [row["what"] for row in run.summary["tried"] if row["what"].startswith("fine-tuning of ")]

    short = budget.train_within(settings, tmp_path / "run", minutes=0.03, clock=TickClock())
    before = read_decisions(short.path)
    assert find_tuned(short) == []
    longer = budget.resume_within(short.path, minutes=0.4, clock=TickClock())
    after = read_decisions(longer.path)
    assert find_tuned(longer)
    # Up to the first answer that there was no time: which one it is depends on how fast this machine is.
    refusals = [value is False or value == [] or what.startswith((EPOCHS, "round of")) for what, value in before]
    same = refusals.index(True)
    assert same > 2
    assert after[1:same] == before[1:same]
    assert (before[0][1], after[0][1]) == pytest.approx((1.8, 24.0))
    assert longer.summary["status"] == "finished"


def test_a_budget_takes_a_linear_head_and_a_model_within_the_limit(photos, tmp_path):
    path = f'data.path="{photos.as_posix()}"'
    cases: list[tuple[list[str], str]] = [
        (["model.head=mlp"], "fits a linear head; got model.head = 'mlp'"),
        (["model.max_parameters_millions=0.1"], r"the limit is 0.1 M; test_resnet has .* Raise it"),
        (["model.min_photos_per_second=1e9"], r"1e\+09 are wanted; test_resnet, the smallest .* Lower it"),
    ]
    for overrides, message in cases:
        with pytest.raises(ConfigError, match=message):
            budget.train_within(load_config(None, [path, *TINY, *overrides]), tmp_path / "no", minutes=1)
        assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(("pace", "number"), [(None, 2), (50, 2), (60, 1), (101, 0)])
def test_networks_answer_together_only_as_fast_as_is_asked_for(pace, number, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(Features, "seconds_per_photo", 0.01)
    model = settings.model.model_copy(update={"min_photos_per_second": pace})
    work = prepare(settings.model_copy(update={"model": model}), tmp_path)
    course = work.course
    candidates = list_candidates(settings, work.backbones)
    entries = [course.score(candidate, course.order) for candidate in candidates[:2]]
    # Each is sure of one half of the photos and undecided about the rest, so that their average is better than either.
    is_first = np.arange(len(course.order)) % 2 == 0
    sure = np.eye(3, dtype=np.float32)[course.dataset.labels[course.order]]
    answers = [np.where(half[:, None], sure, 1 / 3) for half in (is_first, ~is_first)]
    entries = [
        replace(entry, head=replace(entry.head, out_of_fold=answer))
        for entry, answer in zip(entries, answers, strict=True)
    ]
    labels = course.dataset.labels[course.order]
    assert len(best_average(entries, labels, is_allowed=work._may_answer)) == number


def test_check_tells_what_a_head_and_an_epoch_would_cost(settings):
    said = budget.describe_plan(settings)
    assert "process" not in said
    two = settings.model_copy(update={"train": settings.train.model_copy(update={"devices": 2})})
    assert "2 processes share features and fine-tuning" in budget.describe_plan(two)
    assert re.search(r"test_resnet-32-whole: a head on all photos takes \d+ s, an epoch of fine-tuning \d+ s", said)


def test_decisions_are_plain_json_lines_with_the_time_spent(finished):
    records = [json.loads(line) for line in (finished / "plan.jsonl").read_text().splitlines()]
    assert records[0]["what"] == "budget"
    assert records[0]["value"] == 12
    times: list[float] = [record["at"] for record in records]
    assert times == sorted(times)
