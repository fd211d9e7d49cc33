"""The public names are pinned, exist, cost nothing until they are used, and show how in examples that run."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fieldmark

ROOT = Path(__file__).parents[1]
RECIPE = """
model = {name = "test_resnet", weights = "random"}
augment.size = 32
eval.size = 32
loader.workers = 0
schedule.warmup_epochs = 0
train = {epochs = 1, threads = 1, device = "cpu"}
"""
GRID = """
recipe = "recipe.toml"
seeds = [0]
grid = {"mix.share" = [0.0, 0.4]}
"""


def test_every_public_name_exists_and_they_are_sorted():
    assert fieldmark.__all__ == sorted(fieldmark.__all__)
    assert dir(fieldmark) == fieldmark.__all__
    assert all(getattr(fieldmark, name) is not None for name in fieldmark.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trane'"):
        _ = fieldmark.trane


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, fieldmark; print(sorted(m for m in ('torch', 'numpy', 'timm', 'pydantic') if m in sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


class InProcess:
    """Trains a cell at once, here: two processes that load torch would take longer than all examples together."""

    num_slots = 1

    def start(self, job):
        from fieldmark.study.grid import run_job

        run_job(dataclasses.replace(job, parent=0))
        return lambda: ""

    def stop(self):
        pass


@pytest.fixture(scope="module")
def folder(synthetic_run, tmp_path_factory, write_photos) -> Path:
    """photos/, recipe.toml, grid.toml, two trained runs and two runs of invented numbers: what the examples name."""
    root = tmp_path_factory.mktemp("examples")
    write_photos(root / "photos", ("jay", "robin", "wren"))
    write_photos(root / "more-photos", ("owl", "robin"))
    write_photos(root, ("new-photos",), width=56)
    (root / "recipe.toml").write_text(RECIPE)
    (root / "grid.toml").write_text(GRID)
    synthetic_run(root / "runs/plain")
    synthetic_run(root / "runs/mixed", overrides=["mix.share=0.4"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("fieldmark.runs.build.choose_computation", lambda model, wanted, **_: (wanted, ""))
        for seed, name in enumerate(("mine", "other")):
            fieldmark.fit("photos", recipe="recipe.toml", out=f"runs/{name}", seed=seed)
    return root


@pytest.fixture
def workplace(folder, tmp_path, monkeypatch):
    """A copy, so that each example starts from the same, and cells that are trained in this process."""
    monkeypatch.chdir(shutil.copytree(folder, tmp_path / "work"))
    monkeypatch.setattr("fieldmark.study.sweep._open_executor", lambda *_, **__: InProcess())


@pytest.mark.parametrize("name", fieldmark.__all__)
def test_a_public_name_begins_with_a_sentence_and_its_example_runs(name, workplace):
    thing = getattr(fieldmark, name)
    text = inspect.getdoc(thing)
    assert re.match(r"[A-Z][^\n]*[.:]( |\n|$)", text), text
    example = doctest.DocTestParser().get_doctest(text, {"fieldmark": fieldmark, "Path": Path}, name, None, 0)
    assert example.examples, f"{name} has no example"
    assert not any("SKIP" in line.source for line in example.examples)
    runner = doctest.DocTestRunner()
    told: list[str] = []
    runner.run(example, out=told.append)
    assert not runner.failures, "".join(told)


INTERNAL = sorted(
    ".".join(file.relative_to(ROOT / "src").with_suffix("").parts)
    for file in (ROOT / "src").rglob("*.py")
    if "    >>> " in file.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", INTERNAL)
def test_the_examples_of_other_functions_run(module):
    found = [
        example
        for example in doctest.DocTestFinder(recurse=True).find(importlib.import_module(module))
        if example.examples and example.name.rpartition(".")[2] not in fieldmark.__all__
    ]
    runner = doctest.DocTestRunner()
    told: list[str] = []
    for example in found:
        runner.run(example, out=told.append)
    assert not runner.failures, "".join(told)


def test_the_page_about_python_lists_every_public_name():
    page = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    assert re.findall(r"^::: fieldmark\.(\w+)$", page, re.MULTILINE) == fieldmark.__all__
