"""Every family of timm does what docs/families.md says of it: `scripts/families` wrote both."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import timm

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "families"))
RECORDED = SCRIPT["read_results"]()


def pytest_generate_tests(metafunc):
    """Some families, evenly spread; `pytest --families 98 -m slow` takes an hour or more for all."""
    if "family" in metafunc.fixturenames:
        families = timm.list_modules()
        count = min(metafunc.config.getoption("--families"), len(families))
        metafunc.parametrize("family", [families[number * len(families) // count] for number in range(count)])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_family_trains_evaluates_explains_and_exports_or_says_in_one_sentence_what_it_cannot(family):
    found = SCRIPT["run_member"](SCRIPT["choose_member"](family))
    before = RECORDED.get(family, {})
    for step in SCRIPT["STEPS"]:
        if step not in found:
            assert "not finished" in found["note"], found
            continue
        said = str(found[step])
        assert said == "yes" or (said == "none" and step == "attention") or said.startswith("no: "), found
        assert "\n" not in said
        assert before.get(step) != "yes" or said == "yes", (before, found)


def test_the_page_shows_what_is_recorded():
    assert RECORDED
    assert SCRIPT["PAGE"].read_text(encoding="utf-8") == SCRIPT["format_page"](RECORDED)
