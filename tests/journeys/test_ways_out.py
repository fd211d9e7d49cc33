"""Each way out that a message names exists, and works where it is named.

The first tests collect all sentences of the source that name a command, an option or a setting. The others make the
mistake, take the command out of the message as a person would copy it, and run it, in folders with blanks in their
names.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import fieldmark as package
from fieldmark.config import Config, load_config
from fieldmark.runs.folder import Run, flatten
from fieldmark.runs.train import train

SOURCE = Path(package.__file__).parent
OF_OTHERS = {"--head", "--query-gpu", "--format", "--force-reinstall", "--help", "--version"}


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join("{}" if isinstance(part, ast.FormattedValue) else _text(part) for part in node.values)
    return ""


def sentences() -> Iterator[tuple[str, str]]:
    """Every text of the source that is no docstring: its file, and itself with `{}` for what is filled in.

    A call `command("train", "--resume", path)` counts as the text `fieldmark train --resume {}`.
    """
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        left_out = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                left_out |= {part for part in node.values if isinstance(part, ast.Constant)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "command":
                yield path.name, "fieldmark " + " ".join(_text(word) or "{}" for word in node.args)
            elif node not in left_out and (text := _text(node)):
                yield path.name, text


def verbs() -> dict[str, Any]:
    """All commands by their words: "train", "config show"."""
    from fieldmark.cli.app import app

    group: Any = typer.main.get_command(app)
    found = dict(group.commands)
    for name, inner in group.commands.items():
        found |= {f"{name} {word}": verb for word, verb in getattr(inner, "commands", {}).items()}
    return found


def options_of(verb: Any) -> set[str]:
    return {name for parameter in verb.params for name in (*parameter.opts, *parameter.secondary_opts)}


def commands_in(text: str) -> list[str]:
    """The commands that a message names, to their ends."""
    return re.findall(r"fieldmark ((?:train|check|evaluate|\w[\w-]*)\b[^`\n)]*?)(?=`|\n|\)|, |; |\. |$)", text)


def test_every_command_in_a_message_is_a_verb_with_those_options():
    known, found = verbs(), 0
    for where, text in sentences():
        for given in commands_in(text):
            if given.startswith("VERB"):
                continue
            name = next(
                (name for name in sorted(known, key=len, reverse=True) if f"{given} ".startswith(f"{name} ")), ""
            )
            assert name, f"{where}: {text!r} names no verb"
            options = set(re.findall(r"(?<!\S)--[a-z][a-z-]+", given))
            assert options <= options_of(known[name]), f"{where}: {text!r}: {name} takes no {options}"
            found += 1
    assert found > 25


def test_every_option_in_a_message_is_one_of_some_verb():
    known = set.union(*map(options_of, verbs().values()))
    known |= {option for options in known for option in options.split("/")}
    found = 0
    for where, text in sentences():
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text):
            assert option in known | OF_OTHERS, f"{where}: {text!r} names {option}, which no verb takes"
            found += 1
    assert found > 60


def test_every_setting_in_a_message_exists_and_takes_the_value_that_is_named():
    settings = flatten(Config())
    sections = "|".join(sorted({key.partition(".")[0] for key in settings}))
    setting = re.compile(rf"(?<![\w./])((?:{sections})\.[a-z_]+)(?: ?= ?\"?([\w+-]+(?:\.\d+)?))?(?![\w(])")
    found = 0
    for where, text in sentences():
        for key, value in setting.findall(text):
            if key.endswith(
                (
                    ".json",
                    ".safetensors",
                    ".onnx",
                    ".xml",
                    ".pt2",
                    ".py",
                    ".csv",
                    ".toml",
                    ".pt",
                    ".parquet",
                    ".jsonl",
                    ".txt",
                    ".html",
                )
            ):
                continue
            if key not in settings and key not in FORMER:
                is_module = (SOURCE / f"{key.replace('.', '/')}.py").exists()
                assert " " not in text or is_module, f"{where}: {text!r} names {key}, which is no setting"
                continue  # a name of a module or a column
            found += 1
            if value and key in settings and not value.isupper():
                load_config(None, [f"{key}={value}", *COMPANIONS.get((key, value), ())])
    assert found > 40


FORMER = {"mix.prob"}  # what the competition report sets, which is translated
COMPANIONS = {
    ("data.train_on", "train+val"): ("train.select=last",),
    ("data.group_by", "pattern"): ("data.group_pattern=(.*)_",),
    ("data.group_by", "column"): ("data.group_column=group",),
}
"""Settings that another one cannot do without."""


def leave_after(epoch: int, config: Config, out: Path) -> None:
    for report in train(config, out):
        if report.epoch == epoch:
            break


@pytest.fixture
def spaced(tmp_path, monkeypatch) -> Path:
    """An empty working folder with a blank and a quote in its path."""
    folder = tmp_path / "my bird's runs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(trained, spaced) -> Path:
    """A finished run of one's own."""
    return Path(shutil.copytree(trained, spaced / "a run"))


@pytest.fixture
def unfinished(photos, tiny, spaced) -> Path:
    """A run of two epochs that was left after the first."""
    leave_after(1, load_config("laptop", [f"data.path={photos}", *tiny()[1::2]]), spaced / "a run")
    return spaced / "a run"


@pytest.fixture
def follow(fieldmark) -> Callable:
    """Run the command that a refusal names, with words in capitals filled in; it must succeed."""

    def walk(refused, verb: str, *more: str, code: int = 0, **filled: object):
        assert refused.code == 2, refused
        assert "Traceback" not in refused.err
        named = [given for given in commands_in(refused.err) if given.startswith(verb)]
        assert named, f"{refused.err!r} names no {verb}"
        words = [str(filled.get(word, word)) for word in shlex.split(named[0])]
        assert not [word for word in words if re.fullmatch(r"[A-Z]{2,}|N", word)], words
        done = fieldmark(*words, *more)
        assert done.code == code, done.err
        return done

    return walk


def test_a_run_that_was_left_is_offered_for_resuming(unfinished, photos, fieldmark, tiny, follow):
    again = fieldmark("train", photos, "--recipe", "laptop", "--out", unfinished, *tiny())
    follow(again, "train --resume")
    assert Run(unfinished).summary["status"] == "finished"
    follow(fieldmark("train", photos, "--recipe", "laptop", "--out", unfinished, *tiny()), "evaluate")


@pytest.mark.parametrize("epoch", [0, 1])
def test_photos_that_moved_are_named_to_the_resume(photos, tiny, spaced, fieldmark, follow, epoch):
    """Also to a run that has no checkpoint yet and begins again."""
    own = Path(shutil.copytree(photos, spaced / "photos"))
    config = load_config("laptop", [f'data.path="{own}"', *tiny()[1::2]])
    leave_after(epoch, config, spaced / "run")
    moved = own.rename(spaced / "moved photos")
    follow(fieldmark("train", "--resume", spaced / "run"), "train --resume", FOLDER=moved)
    assert Run(spaced / "run").summary["status"] == "finished"


@pytest.mark.parametrize("epoch", [0, 1])
def test_photos_that_broke_may_be_left_out_by_a_new_run(photos, tiny, spaced, fieldmark, follow, epoch):
    own = Path(shutil.copytree(photos, spaced / "photos"))
    config = load_config("laptop", [f'data.path="{own}"', *tiny()[1::2]])
    leave_after(epoch, config, spaced / "run")
    (own / "2" / "0.png").write_bytes(b"")
    follow(fieldmark("train", "--resume", spaced / "run"), "train", "--out", str(spaced / "new run"))
    new = Run(spaced / "new run")
    assert new.config.model == Run(spaced / "run").config.model  # by the same recipe
    assert len(new.split.photos) == 35


def test_broken_photos_may_be_skipped(photos, tiny, spaced, fieldmark):
    own = Path(shutil.copytree(photos, spaced / "photos"))
    for number in range(12):
        (own / "2" / f"broken {number}.png").write_bytes(b"no")
    begin = ("train", own, "--recipe", "laptop", "--out", spaced / "run", *tiny())
    refused = fieldmark(*begin)
    assert "`fieldmark check --json` lists all" in refused.err
    listed = fieldmark("check", own, "--recipe", "laptop", "--json", *tiny())
    assert listed.out.count('"reason"') == 12
    (setting,) = re.findall(r"--set (\S+)", refused.err)
    assert fieldmark(*begin, "--set", setting).code == 0


@pytest.mark.parametrize("harm", ["torn", "flipped", "of another run"])
def test_a_damaged_checkpoint_is_deleted_and_the_run_starts_again(unfinished, photos, tiny, fieldmark, follow, harm):
    state = unfinished / "last.pt"
    data = state.read_bytes()
    if harm == "of another run":
        config = load_config("laptop", [f"data.path={photos}", *tiny("model.head=mlp")[1::2]])
        leave_after(1, config, unfinished.parent / "other")
        data = (unfinished.parent / "other" / "last.pt").read_bytes()
    middle = len(data) // 2
    state.write_bytes(
        {"torn": data[:middle], "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]}.get(
            harm, data
        )
    )
    refused = fieldmark("train", "--resume", unfinished)
    assert refused.code == 2
    assert "elete it" in refused.err
    state.unlink()
    if harm == "of another run":
        follow(refused, "train --resume")
    else:
        assert fieldmark("train", "--resume", unfinished).code == 0
    assert [row["epoch"] for row in Run(unfinished).metrics] == [0, 1, 2]


def test_a_run_without_weights_is_continued_before_it_predicts(unfinished, photos, fieldmark, follow):
    (unfinished / "best.safetensors").unlink()
    (unfinished / "last.pt").unlink()
    follow(fieldmark("predict", unfinished, photos / "2"), "train --resume")
    assert fieldmark("predict", unfinished, photos / "2").code == 0


def test_a_run_without_predictions_is_evaluated_first(run, fieldmark, follow):
    shutil.rmtree(run / "predictions")
    follow(fieldmark("calibrate", run), "evaluate", str(run))
    assert fieldmark("calibrate", run).code == 0


def test_a_run_without_validation_photos_sends_nobody_in_a_circle(photos, spaced, tiny, fieldmark):
    begin = ("train", photos, "--recipe", "laptop", *tiny("data.train_on=train+val", "train.select=last"))
    assert fieldmark(*begin, "--out", spaced / "all").code == 0
    for words in (["calibrate"], ["review", "--port", "0"], ["evaluate"]):
        refused = fieldmark(words[0], spaced / "all", *words[1:])
        assert refused.code == 2, words
        assert "Traceback" not in refused.err
        assert "train+val" in refused.err, refused.err
        assert not commands_in(refused.err), refused.err
    refused = fieldmark("calibrate", spaced / "all")
    (setting,) = re.findall(r"data\.train_on=train\b(?!\+)", refused.err)
    assert fieldmark(*begin, "--set", setting, "--out", spaced / "some").code == 0
    assert fieldmark("calibrate", spaced / "some").code == 0


def test_shares_are_estimated_once_the_run_is_calibrated(run, photos, fieldmark, follow):
    predict = ("predict", run, photos / "2", "--prior", "estimate", "--out", run.parent / "p.csv")
    follow(fieldmark(*predict), "calibrate")
    assert fieldmark(*predict).code == 0


def test_a_damaged_calibration_is_made_again(run, photos, fieldmark, follow):
    assert fieldmark("calibrate", run).code == 0
    text = (run / "calibration.json").read_text()
    (run / "calibration.json").write_text(text.replace('"temperature": ', '"temperature": -'))
    follow(fieldmark("predict", run, photos / "2"), "calibrate", str(run))
    assert fieldmark("predict", run, photos / "2").code == 0


def test_a_column_of_another_name_is_said(run, photos, fieldmark, tiny):
    (run.parent / "list.csv").write_text(f"photo\n{photos / '2' / '0.png'}\n")
    predict = ("predict", run, run.parent / "list.csv", "--out", run.parent / "p.csv")
    refused = fieldmark(*predict)
    assert "--path-column NAME" in refused.err
    assert fieldmark(*predict, "--path-column", "photo").code == 0
    rows = [f"{photo},{photo.parent.name}" for photo in sorted(photos.rglob("*.png")) if "," not in str(photo)]
    (run.parent / "table.csv").write_text("path,kind\n" + "\n".join(rows) + "\n")
    begin = ("train", run.parent / "table.csv", "--recipe", "laptop", "--out", run.parent / "new", *tiny())
    refused = fieldmark(*begin)
    (setting,) = re.findall(r"--set (data\.label_column)=NAME", refused.err)
    assert fieldmark(*begin, "--set", f"{setting}=kind").code == 0


def test_two_photos_of_one_name_and_another_order_have_their_options(run, photos, fieldmark):
    out = run.parent / "p.csv"
    refused = fieldmark("predict", run, photos, "--form", "leaderboard", "--out", out)
    (form,) = re.findall(r"--form (\w+)", refused.err)
    assert fieldmark("predict", run, photos, "--form", form, "--out", out).code == 0
    (run.parent / "sample.csv").write_text("image_name,pred_label\n" + "".join(f"{n},x\n" for n in range(11, -1, -1)))
    predict = ("predict", run, photos / "2", "--sample", run.parent / "sample.csv", "--out", out)
    refused = fieldmark(*predict)
    assert refused.code == 2
    (option,) = re.findall(r"Give (--[a-z-]+)", refused.err)
    assert fieldmark(*predict, option).code == 0


def test_what_exists_already_may_be_written_elsewhere(run, fieldmark):
    refused = fieldmark("combine", run, run, "--out", run)
    assert refused.code == 2
    assert "choose another --out" in refused.err
    (run.parent / "file").touch()
    assert "--out" in fieldmark("evaluate", run, "--out", run.parent / "file").err
    assert fieldmark("evaluate", run, "--out", run.parent / "folder").code == 0


def test_an_unknown_setting_or_recipe_or_grid_leads_to_the_list(photos, tiny, spaced, fieldmark, follow):
    listed = follow(fieldmark("train", photos, "--set", "train.frobnicate=1"), "config show")
    assert "epochs" in listed.out
    refused = fieldmark("sweep", "laptop", "--data", photos, "--out", spaced / "sweep")
    (example,) = [given for given in commands_in(refused.err) if given.startswith("sweep")]
    words = shlex.split(example.replace("RECIPE", "laptop").replace("--seeds 3", "--seeds 1"))
    done = fieldmark(*words, "--data", photos, "--out", spaced / "my sweep", *tiny())
    assert done.code == 0, done.err
    (report,) = [given for given in commands_in(done.out) if given.startswith("report")]
    assert fieldmark(*shlex.split(report)).code == 0
    assert (spaced / "report.html").is_file()


def test_the_next_steps_after_training_are_commands_that_work(run, photos, spaced, fieldmark):
    from fieldmark.runs.train import format_result

    evaluate, predict = commands_in(format_result(Run(run)))
    assert fieldmark(*shlex.split(evaluate)).code == 0
    assert fieldmark(*shlex.split(predict.replace("PHOTOS", shlex.quote(str(photos / "2"))))).code == 0
    assert (spaced / "prediction.csv").is_file()


def test_the_command_after_a_review_trains_with_the_corrections(run, photos, spaced, tiny, fieldmark):
    from fieldmark.serve.review import open_review

    table = spaced / "my corrections.csv"
    table.write_text('path,action,label\n2/0.png,relabel,10\n2/1.png,drop,\n"great, tit/2.png",keep,\n')
    app = open_review([Run(run)], table, max_distance=4)
    told = app.state.views.overview()["command"]
    words = shlex.split(told.removeprefix("fieldmark "))
    done = fieldmark(*words, "--recipe", "laptop", "--out", spaced / "new", *tiny())
    assert done.code == 0, done.err
    labels = {photo.path: photo.label for photo in Run(spaced / "new").split.photos}
    assert labels["2/0.png"] == "10"
    assert "2/1.png" not in labels


@pytest.mark.slow
def test_of_an_ensemble_one_network_is_exported_as_it_says(run, trained, fieldmark):
    second = Path(shutil.copytree(trained, run.parent / "second"))
    assert fieldmark("combine", run, second, "--out", run.parent / "both").code == 0
    refused = fieldmark("export", run.parent / "both", "--to", "torch")
    (told,) = re.findall(r"`fieldmark ([^`]*)`", refused.err)
    assert fieldmark(*shlex.split(told)).code == 0
    assert (run.parent / "both" / "members" / "0-torch" / "model.pt2").is_file()


@pytest.mark.slow
def test_runs_that_are_no_soup_are_an_ensemble_and_a_head_that_timm_cannot_hold_is_exported_otherwise(
    run, photos, tiny, fieldmark
):
    other = run.parent / "mlp"
    assert (
        fieldmark("train", photos, "--recipe", "laptop", "--out", other, *tiny("model.head=mlp", "probe.epochs=0")).code
        == 0
    )
    refused = fieldmark("combine", run, other, "--method", "soup", "--out", run.parent / "both")
    (option,) = re.findall(r"`--method (\w+)`", refused.err)
    assert fieldmark("combine", run, other, "--method", option, "--out", run.parent / "both").code == 0
    refused = fieldmark("export", other, "--to", "timm")
    forms = re.findall(r"--to (\w+) or (\w+)", refused.err)
    assert forms == [("onnx", "torch")]
    assert fieldmark("export", other, "--to", "torch", "--out", run.parent / "exported").code == 0
    (run.parent / "exported" / "model.pt2").write_bytes(b"torn")
    refused = fieldmark("predict", run.parent / "exported", photos / "2")
    assert "Export the run again" in refused.err
    refused = fieldmark("export", other, "--to", "torch", "--out", run.parent / "exported")
    assert "give another --out, or remove it" in refused.err
    shutil.rmtree(run.parent / "exported")
    assert fieldmark("export", other, "--to", "torch", "--out", run.parent / "exported").code == 0


def test_a_signal_to_the_command_line_is_told_whatever_it_is_at(fieldmark, monkeypatch):
    import signal

    from fieldmark import config

    def stopped():
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(config, "recipe_names", stopped)
    before = signal.getsignal(signal.SIGTERM)
    done = fieldmark("recipes", "list")
    assert (done.code, done.err) == (130, "stopped by Ctrl-C or SIGTERM\n")
    assert signal.getsignal(signal.SIGTERM) == before
