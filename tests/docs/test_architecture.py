"""The map of the house shows every room."""

from __future__ import annotations

import importlib
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
