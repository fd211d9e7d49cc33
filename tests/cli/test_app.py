"""The command line as a whole: its help, its short options, completion, and the verbs that describe."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import fieldmark
from fieldmark.cli import train
from fieldmark.cli.app import app, main
from fieldmark.cli.options import complete_recipe, complete_run, complete_setting, flag_overrides, quick_imports
from fieldmark.config import Config, load_config
from fieldmark.overrides import list_settings

HIDDEN = {"split", "cache", "preview", "recipes"}


def invoke(*words: str):
    return CliRunner().invoke(app, list(words))


def test_the_help_is_a_page_of_verbs_in_groups_and_names_the_others():
    commands = get_command(app).commands
    assert len(invoke("-h").output.splitlines()) <= 42
    assert {name for name, command in commands.items() if command.hidden} == HIDDEN
    text = invoke("-h").output
    positions = [text.index(f"\n{title}:\n") for title in ("Prepare", "Train", "Use a model", "Compare and improve")]
    assert positions == sorted(positions)
    assert "Commands:" not in text
    for name in commands:
        assert name in text[positions[0] :]


@pytest.mark.parametrize("verb", sorted(get_command(app).commands))
def test_every_verb_answers_to_h(verb):
    result = invoke(verb, "-h")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_the_version_is_printed_and_is_the_packages():
    assert invoke("--version").output == f"fieldmark {fieldmark.__version__}\n"


def test_short_options_are_short_for_set(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "run_training", lambda data, recipe, out, overrides, **_: seen.append(overrides))
    words = ["--epochs", "3", "--model", "resnet18", "--batch-size", "7", "--lr", "1e-3", "--seed", "5"]
    words += ["--device", "cpu", "--track", "tensorboard", "--track", "wandb", "--size", "96"]
    assert invoke("train", "photos", "--recipe", "laptop", *words, "--set", "train.seed=9").exit_code == 0
    config = load_config("laptop", seen[0])
    assert (config.train.epochs, config.model.name, config.train.batch_size) == (3, "resnet18", 7)
    assert (config.optim.lr, config.train.device, config.train.trackers) == (1e-3, "cpu", ("tensorboard", "wandb"))
    assert (config.augment.size, config.eval.size) == (96, None)
    assert config.train.seed == 9  # --set has the last word


def test_the_size_is_that_of_evaluation_too_where_the_recipe_fixes_one():
    config = load_config("competition", flag_overrides("competition", track=None, size=128))
    assert (config.augment.size, config.eval.size) == (128, 128)


def test_a_resumed_run_takes_no_short_option(tmp_path):
    result = invoke("train", "--resume", str(tmp_path), "--epochs", "3")
    assert result.exit_code == 2
    assert "give nothing else" in result.output


def test_recipes_settings_values_and_runs_are_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lake.toml").touch()
    for name in ("runs/one", "runs/empty", "two"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("runs/one", "two"):
        (tmp_path / name / "recipe.toml").touch()
    assert complete_recipe("la") == ["lake.toml", "laptop"]
    assert complete_setting("mix.s") == ["mix.share="]
    assert len(complete_setting("")) == len(list_settings(Config))
    assert complete_setting("eval.transform=") == ["eval.transform=pretrained", "eval.transform=squash"]
    assert complete_setting("train.deterministic=t") == ["train.deterministic=true"]
    assert complete_run("") == ["runs/one", "two"]
    assert complete_run("runs/") == ["runs/one"]


def test_a_shell_gets_its_completions():
    environment = os.environ | {
        "_FIELDMARK_COMPLETE": "complete_bash",
        "COMP_WORDS": "fieldmark train photos --recipe lap",
        "COMP_CWORD": "4",
    }
    code = "import sys; sys.argv = ['fieldmark']; from fieldmark.cli.app import app; app(prog_name='fieldmark')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["laptop"]


def test_config_show_explains_each_setting_and_is_a_recipe(tmp_path):
    text = invoke("config", "show", "strong", "--set", "epochs=3").output
    assert "# Share of the batches that are mixed; the others stay as they are.\nshare = 0.5\n" in text
    assert text.count("# ") >= len(list_settings(Config))
    (tmp_path / "shown.toml").write_text(text)
    assert load_config(tmp_path / "shown.toml") == load_config("strong", ["train.epochs=3"])
    plain = invoke("config", "show", "strong", "--set", "epochs=3", "--no-comments").output
    assert "#" not in plain
    assert tomllib.loads(plain) == tomllib.loads(text)


def test_recipes_are_listed_under_config_and_by_the_old_verb():
    assert invoke("config", "recipes").output == invoke("recipes", "list").output
    assert "competition " in invoke("config", "recipes").output


def test_doctor_describes_machine_versions_weights_extras_and_folders(monkeypatch):
    monkeypatch.setattr("fieldmark.cli.prepare.hub_answers", lambda: False)
    found = json.loads(invoke("doctor", "--json").stdout)
    assert found["versions"]["torch"]
    assert "tf_efficientnet_lite0 (package:efficientnet-lite0)" in found["weights"]
    assert found["extras"]["serve"] == []
    assert not {"test", "bench", "docs"} & found["extras"].keys()
    assert {folder["name"] for folder in found["folders"]} == {"cache", "runs"}
    assert all(folder["free_gigabytes"] > 0 for folder in found["folders"])
    text = invoke("doctor").stdout
    assert "hub        does not answer" in text
    assert str(Path.home()) + "/.cache" not in text


def test_doctor_asks_the_mirror_of_the_hub_where_one_is_set(monkeypatch):
    from fieldmark.cli import prepare

    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as mirror:  # answers 501, which is an answer
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{mirror.server_port}")
        answering = threading.Thread(target=mirror.handle_request)
        answering.start()
        assert prepare.hub_answers()
        answering.join()
    assert not prepare.hub_answers()


def test_an_extra_that_lacks_a_package_is_named(monkeypatch):
    from fieldmark.cli import prepare
    from fieldmark.runs import environment

    monkeypatch.setattr(
        environment, "package_versions", lambda names: {name: "1" for name in names if name != "uvicorn"}
    )
    assert prepare.find_extras()["serve"] == ["uvicorn"]


def test_a_notebooks_backend_of_matplotlib_does_not_matter(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setattr(sys, "argv", ["fieldmark", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ["MPLBACKEND"] == "agg"


def test_models_are_timed_here_on_request():
    row = json.loads(invoke("models", "test_resnet", "--measure", "--json").output)[0]
    assert row["photos_per_second"] > 0


def test_imports_without_searches_for_garbage_leave_the_collector_on() -> None:
    with quick_imports():
        assert not gc.isenabled()
    with pytest.raises(ImportError), quick_imports():
        raise ImportError("a library is missing")
    assert gc.isenabled()
    gc.unfreeze()  # the tests that follow make garbage of what is here
