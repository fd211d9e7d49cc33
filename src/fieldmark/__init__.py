"""Fieldmark: train the best photo classifier your time can buy, know which choices earned it, and use it.

The public names are those in `__all__`. Each is imported when it is first asked for, so `import fieldmark` is fast.
"""

import ast
import os
from importlib import import_module
from pathlib import Path
from typing import Any

# Read once, when torch is loaded. By default threads of a network spin where they meet, which on a core that another
# program uses too costs four fifths of the speed. A short spin loses little on a quiet machine (docs/performance.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text("utf-8"))  # names by module, as type checkers read them
_HOMES = {one.name: str(node.module) for node in _STUB.body if isinstance(node, ast.ImportFrom) for one in node.names}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fieldmark")
    if name not in _HOMES:
        raise AttributeError(f"module 'fieldmark' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
