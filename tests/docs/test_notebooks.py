"""The notebooks in examples/ run from top to bottom, on generated photos and with a tiny model.

Cells are executed as a notebook does: in one namespace, `!` lines by a shell, the last expression shown by its
`_repr_html_`. The cell tagged `parameters` is followed by values of the test's own.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TINY = {
    "model": {"name": "test_resnet", "weights": "random"},
    "augment": {"size": 32},
    "eval": {"size": 32},
    "train": {"epochs": 1, "threads": 1, "device": "cpu"},
    "mix": {"off_epochs": 0},
    "probe": {"epochs": 2},
    "loader": {"workers": 0},
    "schedule": {"warmup_epochs": 0},
}
PARAMETERS = {"own-photos": {"MINUTES": 0.3}, "competition": {"SETTINGS": TINY}}


def code_cells(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def run_cell(source, names):
    """Execute a cell as IPython would; what it shows of its last expression, as HTML if there is any."""
    python = re.sub(r"^( *)!(.*)$", r"\1run_shell(f'''\2''')", source, flags=re.MULTILINE)
    tree = ast.parse(python)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if last is None:
        return ""
    value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    return value._repr_html_() if hasattr(value, "_repr_html_") else "" if value is None else repr(value)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch, write_photos):
    write_photos(tmp_path / "photos", ("jay", "robin", "wren"))
    shutil.copytree(tmp_path / "photos/jay", tmp_path / "new-photos")
    (tmp_path / "sample.csv").write_text("image_name,pred_label\n" + "".join(f"{n},jay\n" for n in range(9, -1, -1)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    printed = []

    def run_shell(command):
        words = command.replace("fieldmark ", f"{sys.executable} -m fieldmark ", 1)
        done = subprocess.run(words, shell=True, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)

    names = {"run_shell": run_shell}
    shown = []
    for cell in code_cells(notebook):
        shown.append(run_cell("".join(cell["source"]), names))
        if "parameters" in cell["metadata"].get("tags", []):
            names |= PARAMETERS[notebook.stem]
    assert any("<svg" in html and "top-1" in html for html in shown)
    if notebook.stem == "own-photos":
        assert any('src="data:image/jpeg' in html for html in shown)
        assert len((tmp_path / "names.csv").read_text().splitlines()) == 11
        assert (tmp_path / "model.zip").stat().st_size > 1000
    else:
        assert any("photos" in html and "<li>" in html for html in shown)
        assert (tmp_path / "prediction.zip").is_file()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_plain_and_says_what_a_hosted_one_needs(notebook):
    """No outputs are kept, every code cell is Python, and lines to install come first, commented out."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    cells = code_cells(notebook)
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    assert "install" in cells[0]["metadata"]["tags"]
    assert all(line.startswith("# ") for line in cells[0]["source"])
    assert any("%pip install" in line for line in cells[0]["source"])
    for cell in cells:
        ast.parse(re.sub(r"^!.*$", "pass", "".join(cell["source"]), flags=re.MULTILINE))


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["competition", "own-photos"]
