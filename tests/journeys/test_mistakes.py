"""Each mistake on the way is answered by one clear message and exit code 2, without a traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fieldmark.errors import FieldmarkError, ReportedElsewhereError


def assert_told(result, *parts):
    assert result.code == 2
    assert result.err.count("error: ") == 1
    assert "Traceback" not in result.err
    for part in parts:
        assert part in result.err


def within_minutes(words: list[str]) -> list[str]:
    """The settings without epochs, which a training without a recipe plans itself."""
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for key, pair in pairs if not pair.startswith("train.epochs=") for word in (key, pair)]


def test_wrong_path(fieldmark, photos, tiny):
    wrong = photos.parent / "fotos"
    assert_told(fieldmark("train", wrong, "--out", "unused", *within_minutes(tiny())), "fotos", "photos")


def test_no_path(fieldmark):
    assert_told(fieldmark("train", "--out", "unused"), "no data", "DATA")


def test_empty_folder(fieldmark, tmp_path):
    assert_told(fieldmark("check", tmp_path), "is empty")


def test_one_class(fieldmark, tmp_path, make_photo, tiny):
    for number in range(5):
        make_photo(tmp_path / "data" / "robin" / f"{number}.png", (1, 2, 3), number)
    result = fieldmark("train", tmp_path / "data", "--out", tmp_path / "run", *within_minutes(tiny()))
    assert_told(result, "2 classes", "'robin'")


def test_epochs_go_with_a_recipe(fieldmark, photos, tmp_path):
    assert_told(fieldmark("train", photos, "--out", tmp_path / "run", "--epochs", "5"), "--recipe laptop")
    assert not (tmp_path / "run").exists()


def test_two_photos_a_class_train_or_are_told_why_not(fieldmark, tmp_path, make_photo, tiny):
    for name in ("a", "b"):
        for number in range(2):
            make_photo(tmp_path / "data" / name / f"{number}.png", (1, 2, 3), number)
    result = fieldmark("train", tmp_path / "data", "--recipe", "laptop", "--out", tmp_path / "run", *tiny())
    assert result.code in (0, 2)
    assert "Traceback" not in result.err
    if result.code:
        assert_told(result)


def test_weights_that_are_not_there(fieldmark, photos, tiny, tmp_path):
    arguments = within_minutes(tiny("model.weights=/nowhere/w.safetensors"))
    assert_told(fieldmark("train", photos, "--out", tmp_path / "run", *arguments), "/nowhere/w.safetensors")


def test_a_misspelt_setting_and_recipe(fieldmark):
    assert_told(fieldmark("config", "show", "--set", "train.epocs=3"), "did you mean train.epochs?")
    assert_told(fieldmark("config", "show", "stronk"), "no recipe 'stronk'", "strong")


def test_a_folder_that_is_no_run(fieldmark, photos, tmp_path):
    assert_told(fieldmark("evaluate", tmp_path), "is not a run")
    assert_told(fieldmark("predict", tmp_path / "none", photos), "none")


def test_photos_that_are_no_longer_where_they_were(fieldmark, trained, photos, tmp_path):
    assert_told(fieldmark("evaluate", trained, "--data", photos.parent / "fotos"), "fotos does not exist", "'photos'?")
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    told = json.loads((moved / "data.json").read_text()) | {"root": "/gone"}
    (moved / "data.json").write_text(json.dumps(told))
    assert_told(fieldmark("evaluate", moved, "--split", "train"), "were in /gone, which is gone", "--data")


def test_an_ending_that_is_no_format(fieldmark, trained, photos, tmp_path):
    result = fieldmark("predict", trained, photos / "2", "--out", tmp_path / "p.xlsx")
    assert_told(result, "p.xlsx", ".csv, .zip, .json, .parquet")


def test_two_photos_of_one_name(fieldmark, trained, photos, tmp_path):
    leaderboard = ("predict", trained, photos, "--form", "leaderboard", "--out", tmp_path / "p.csv")
    assert_told(fieldmark(*leaderboard), "would both be '0'", "long form")
    assert fieldmark("predict", trained, photos, "--out", tmp_path / "p.csv", "--form", "long").code == 0


def test_resume_with_other_settings_is_a_usage_error(fieldmark, trained):
    result = fieldmark("train", "--resume", trained, "--set", "train.epochs=9")
    assert result.code == 2
    assert "give nothing else" in result.err


def test_check_ends_with_2_where_something_must_be_fixed(fieldmark, tmp_path, make_photo, tiny, monkeypatch):
    monkeypatch.setattr("fieldmark.runs.check.SECONDS_MEASURED", 0.05)
    for name in ("a", "b"):
        for number in range(12):
            make_photo(tmp_path / "data" / name / f"{number}.png", (9 * number, 2, 3), number + 50 * (name == "b"))
    assert fieldmark("check", tmp_path / "data", "--recipe", "laptop", *tiny()).code == 0
    broken = tmp_path / "data" / "a" / "3.png"
    broken.write_bytes(broken.read_bytes()[:100])
    result = fieldmark("check", tmp_path / "data", "--recipe", "laptop", *tiny())
    assert result.code == 2
    assert "broken: 'a/3.png'" in result.out
    assert "not ready to train" in result.out
    found = json.loads(fieldmark("check", tmp_path / "data", "--recipe", "laptop", "--json", *tiny()).out)
    assert [row["path"] for row in found["broken"]] == ["a/3.png"]
    assert found["must_fix"]
    assert found["estimates"]["memory_gigabytes"] > 0


def test_training_refuses_broken_photos_and_skips_them_when_asked(fieldmark, tmp_path, make_photo, tiny):
    for name in ("a", "b"):
        for number in range(8):
            make_photo(tmp_path / "data" / name / f"{number}.png", (9 * number, 2, 3), number)
    (tmp_path / "data" / "b" / "0.png").write_bytes(b"")
    arguments = ("train", tmp_path / "data", "--recipe", "laptop", "--out", tmp_path / "run")
    assert_told(fieldmark(*arguments, *tiny()), "'b/0.png'", "--set data.broken=skip")
    assert fieldmark(*arguments, *tiny("data.broken=skip")).code == 0
    assert "b/0.png" in (tmp_path / "run" / "broken.csv").read_text()


def test_a_bug_keeps_its_traceback(monkeypatch, capsys):
    from fieldmark import config
    from fieldmark.cli import app

    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr(config, "recipe_names", broken)
    monkeypatch.setattr(sys, "argv", ["fieldmark", "recipes", "list"])
    with pytest.raises(ZeroDivisionError):
        app.main()


@pytest.mark.parametrize(
    "error",
    [error for error in FieldmarkError.__subclasses__() if error is not ReportedElsewhereError],
    ids=lambda error: error.__name__,
)
def test_every_error_of_ours_becomes_one_message(monkeypatch, fieldmark, error):
    from fieldmark import config

    def broken():
        raise error("one", "two") if error.__name__ == "MissingExtraError" else error("told plainly")

    monkeypatch.setattr(config, "recipe_names", broken)
    result = fieldmark("recipes", "list")
    assert result.code == (130 if error.__name__ == "InterruptedRunError" else 2)
    assert "Traceback" not in result.err
    assert len(result.err.splitlines()) == 1


def test_ctrl_c_ends_with_130(monkeypatch, fieldmark):
    from fieldmark import config

    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "recipe_names", stopped)
    assert fieldmark("recipes", "list").code == 130


def test_ctrl_c_says_so_in_one_line(monkeypatch, fieldmark):
    from fieldmark import config

    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "recipe_names", stopped)
    assert fieldmark("recipes", "list").err == "stopped by Ctrl-C or SIGTERM\n"


@pytest.mark.parametrize(
    ("number", "told"),
    [(errno.ENOSPC, "Free some space"), (errno.EACCES, "another place"), (errno.EROFS, "another place")],
)
def test_what_the_machine_refuses_is_told_and_not_traced(monkeypatch, fieldmark, number, told):
    from fieldmark import config

    def refused():
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr(config, "recipe_names", refused)
    assert_told(fieldmark("recipes", "list"), f"some/file: {os.strerror(number)}", told)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="not on this system")
def test_results_that_find_no_room_are_one_message():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "fieldmark", "config", "show", "competition"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device. Free some space\n")


def test_a_split_table_that_cannot_be_written_is_one_message_and_leaves_nothing(fieldmark, photos, tiny, tmp_path):
    (tmp_path / "folder.csv").mkdir()
    assert_told(fieldmark("split", photos, "--out", tmp_path / "folder.csv", *tiny()), "folder.csv could not be")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.csv"]
    (tmp_path / "file").touch()
    assert_told(fieldmark("split", photos, "--out", tmp_path / "file" / "s.csv", *tiny()), "s.csv could not be written")


def test_a_split_table_may_be_in_a_folder_that_is_not_there_yet(fieldmark, photos, tiny, tmp_path):
    assert fieldmark("split", photos, "--out", tmp_path / "new" / "s.csv", *tiny()).code == 0
    assert (tmp_path / "new" / "s.csv").read_text().startswith("path,label,split")


@pytest.mark.parametrize("verb", ["predict", "check", "train", "evaluate", "split", "preview"])
def test_a_verb_alone_is_told_what_it_misses(fieldmark, verb):
    result = fieldmark(verb)
    assert result.code == 2
    assert "Traceback" not in result.err
    assert "Missing argument" in result.err or "no data" in result.err


def test_weights_that_cannot_be_read_are_one_message(fieldmark, trained, photos, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "best.safetensors").write_bytes(b"torn")
    assert_told(fieldmark("predict", run, photos), "best.safetensors cannot be read")
    (run / "best.safetensors").unlink()
    assert_told(fieldmark("predict", run, photos), "no weights yet")


def test_an_empty_class_folder_is_counted(fieldmark, tmp_path, make_photo, tiny):
    for number in range(5):
        make_photo(tmp_path / "data" / "robin" / f"{number}.png", (1, 2, 3), number)
    (tmp_path / "data" / "wren").mkdir()
    told = fieldmark("check", tmp_path / "data", "--recipe", "laptop", *tiny())
    assert told.code == 2
    assert "5 photos, 1 class\n" in told.out
    assert "skipped: empty folder (1)" in told.out
    assert "there is only 'robin'" in told.out


def test_a_photo_alone_that_cannot_be_read_is_told_on_stdout_too(fieldmark, trained, tmp_path):
    (tmp_path / "one.png").write_bytes(b"")
    result = fieldmark("predict", trained, tmp_path / "one.png")
    assert_told(result, "'one.png' is empty")
    assert "one.png\t(could not be read: is empty (0 bytes))" in result.out


def test_the_libraries_below_say_nothing(trained, photos, tmp_path):
    """In a process of its own: a logger that was silenced once stays so."""
    command = [sys.executable, "-m", "fieldmark", "predict", str(trained), str(photos / "2")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['fieldmark', '--help']\n"
        "from fieldmark.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'timm', 'pydantic', 'PIL', 'matplotlib', 'rich', 'scipy'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    for verb in ("check", "models", "train", "evaluate", "predict", "demo"):
        assert f"\n  {verb} " in done.stdout


def test_a_closed_pipe_is_no_bug():
    command = [sys.executable, "-m", "fieldmark", "config", "show", "competition"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in done.stderr
    assert done.returncode == 1
