"""The commands and the Python of README and docs run as written, on generated photos and with a tiny model."""

# ruff: noqa: F401, F811, fixtures of other tests

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from tests.data.test_shards import upload
from tests.inference.test_remote import s3

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "docs/reference"
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent != GENERATED),
]
TINY = [
    *("model.name=test_resnet", "model.weights=random", "augment.size=32", "eval.size=32", "train.epochs=1"),
    *("mix.off_epochs=0", "probe.epochs=2", "schedule.warmup_epochs=0", "loader.workers=0", "train.threads=1"),
    "train.device=cpu",
]
TAKES_A_RECIPE = {"check", "split", "cache", "preview", "train"}
QUICK = {"README", "config", "evaluate", "models", "predict", "recipes"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


COMMANDS = [page for page in PAGES if commands(page)]


def run(command: str, patch: pytest.MonkeyPatch) -> int:
    from fieldmark.cli.app import main

    words = shlex.split(command.replace("--minutes 10", "--minutes 0.2"), comments=True)
    assert words[0] == "fieldmark"
    settings = [one for one in TINY if "--minutes" not in words or not one.startswith("train.epochs=")]
    tiny = [word for setting in settings for word in ("--set", setting)] if words[1] in TAKES_A_RECIPE else []
    patch.setattr(sys, "argv", [*words, *tiny])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_photos) -> Path:
    """photos/, new-photos/, sample.csv and the run runs/mine that the README's three commands make."""
    root = tmp_path_factory.mktemp("docs")
    write_photos(root / "photos", ("jay", "robin", "wren"))
    write_photos(root / "more-photos", ("owl", "robin"))
    write_photos(root, ("new-photos",), width=56)
    (root / "sample.csv").write_text("image_name,pred_label\n" + "".join(f"{n},jay\n" for n in range(10)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "user-cache"))
        patch.chdir(root)
        assert run("fieldmark train photos --recipe laptop --out runs/mine", patch) == 0
    return root


@pytest.fixture
def workplace(folder, tmp_path, monkeypatch) -> Path:
    """A copy, so that each page starts from the same."""
    for name in ("photos", "more-photos", "new-photos", "runs"):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copy(folder / "sample.csv", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_commands_to_run():
    assert ROOT / "README.md" in COMMANDS
    assert sum(len(commands(page)) for page in PAGES) >= 25


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.stem, marks=[] if page.stem in QUICK else pytest.mark.slow) for page in COMMANDS],
)
def test_every_command_of_a_page_works(page, workplace, monkeypatch):
    for command in commands(page):
        if "--out runs/mine" in command:
            shutil.rmtree("runs/mine")
        assert run(command, monkeypatch) == 0, command


def other_commands(page: Path) -> list[str]:
    """Lines that begin with `fieldmark` in blocks that are shown and not run: shell and text."""
    lines = [line for language in ("sh", "text") for block in blocks(page, language) for line in block.splitlines()]
    return [line for line in lines if line.startswith("fieldmark ")]


OTHERS = [(page.stem, command) for page in PAGES for command in other_commands(page)]


@pytest.mark.parametrize(("page", "command"), OTHERS)
def test_every_command_that_is_shown_is_one(page, command):
    """Verb, options, values and number of arguments, without doing it."""
    import typer.main

    from fieldmark.cli.app import app

    words = shlex.split(command, comments=True)[1:]
    verb = typer.main.get_command(app).commands[words[0]]
    verb.make_context(words[0], words[1:])


@pytest.fixture(scope="module")
def compared(synthetic_run, tmp_path_factory) -> Path:
    """The runs and sweeps that the pages of compare and report speak of."""
    root = tmp_path_factory.mktemp("compared")
    for name in ("runs/plain", "runs/mixed", "runs/a", "runs/b", "sweeps/mixing/0", "sweeps/mixing/1",
                 "sweeps/elements/strong", "sweeps/elements/gentle"):  # fmt: skip
        is_other = name.endswith(("mixed", "b", "1", "gentle"))
        synthetic_run(root / name, overrides=["mix.share=0.4"] if is_other else [])
    return root


@pytest.mark.parametrize(
    "command", [command for page, command in OTHERS if page in ("compare", "report") and "sweep " not in command]
)
def test_the_commands_of_compare_and_report_work(compared, monkeypatch, command):
    monkeypatch.chdir(compared)
    assert run(command, monkeypatch) == 0


def test_every_paper_that_the_code_or_a_page_names_is_cited():
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]
    named = {number for file in files for number in re.findall(r"arXiv:(\d{4}\.\d{4,5})", file.read_text("utf-8"))}
    assert len(named) > 20
    assert not named - set(re.findall(r"arXiv:(\d{4}\.\d{4,5})", (ROOT / "CITATION.cff").read_text("utf-8")))


def test_the_readme_names_the_pinned_torch():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    torch, torchvision = (next(pin for pin in pins if pin.startswith(f"{name}==")) for name in ("torch", "torchvision"))
    assert f"`{torch} {torchvision}`" in (ROOT / "README.md").read_text()


def test_the_python_of_the_readme_runs(workplace, capsys):
    (code,) = blocks(ROOT / "README.md", "python")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.count("robin") == 10


def test_the_python_of_the_page_on_sweeps_runs(workplace):
    codes = blocks(ROOT / "docs/verbs/sweep.md", "python")
    assert len(codes) == 2
    tiny = ", ".join(map(repr, TINY))
    settings = str(dict(pair.split("=") for pair in TINY))[1:-1]
    for code in codes:
        code = code.replace('"data.path=photos"', f'"data.path=photos", {tiny}').replace("n_trials=20", "n_trials=2")
        code = code.replace('"data.path": "photos"', f'"data.path": "photos", {settings}')
        exec(compile(code, "sweep.md", "exec"), {})
    assert {path.name for path in Path("sweeps/lr").iterdir() if path.name[0].isdigit()} == {"0", "1"}


def test_every_link_between_pages_leads_somewhere():
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())]
    assert links
    broken = [
        f"{page.name}: {link}"
        for page, link in links
        if not (page.parent / link).exists() and not link.endswith("reference/cli.md")
    ]
    assert not broken


def test_every_verb_has_a_page():
    import typer.main

    from fieldmark.cli.app import app

    verbs = set(typer.main.get_command(app).commands)
    pages = {page.stem for page in PAGES}
    assert verbs
    assert verbs <= pages


def test_every_pitfall_has_an_anchor_and_says_what_fieldmark_does():
    text = (ROOT / "docs/pitfalls.md").read_text()
    assert (
        len(re.findall(r"^## .* \{ #[a-z-]+ \}$", text, re.MULTILINE)) == text.count("**What Fieldmark does.**") == 15
    )


@pytest.mark.slow
def test_the_commands_for_photos_in_a_store_work(workplace, s3, monkeypatch):
    """The page's shards, uploaded to a stand-in, trained on and evaluated as the page says."""
    page = ROOT / "docs/how-to/millions.md"
    assert run(commands(page)[0], monkeypatch) == 0
    upload(s3(), Path("shards"), "bucket/shards")
    asked = [command for command in other_commands(page) if "runs/far" in command]
    assert len(asked) == 2
    for command in asked:
        assert run(command, monkeypatch) == 0, command
