"""The map of the house shows every room."""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_list_of_modules_is_complete():
    house = runpy.run_path(str(ROOT / "scripts/house"))
    assert (ROOT / "docs/architecture.md").read_text() == house["page_with_list"](), "run: scripts/house --write"


def test_every_module_can_be_imported():
    house = runpy.run_path(str(ROOT / "scripts/house"))
    for file in house["modules"]():
        importlib.import_module(".".join(file.relative_to(ROOT / "src").with_suffix("").parts))


def test_every_file_and_name_that_contributing_mentions_is_there():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    quoted = set(re.findall(r"`([^`\n]+)`", page))
    files = {text for text in quoted if re.fullmatch(r"[\w.-]+(/[\w.-]+)*(/|\.(py|toml|txt|md))", text)}
    assert len(files) > 20
    assert not {text for text in files if not any((root / text).exists() for root in (ROOT, ROOT / "src/fieldmark"))}
    source = "".join(file.read_text() for file in (ROOT / "src").rglob("*.py"))
    names = {text for text in quoted if re.fullmatch(r"_?[A-Z]\w+|[a-z]+_\w+", text)}
    assert len(names) > 8
    assert not {name for name in names if not re.search(rf"\b{name}\b", source)}
