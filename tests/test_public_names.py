"""The public names are pinned, exist, and cost nothing until they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fieldmark


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
