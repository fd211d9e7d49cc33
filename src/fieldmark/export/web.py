"""The page of `serve` and ONNX Runtime Web beside an exported model: a browser answers, with any server of files."""

from __future__ import annotations

import gzip
import lzma
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from fieldmark.augment.reference import eval_reference
from fieldmark.inference.exported import Compute, ModelMetadata

_PACKAGE = Path(__file__).parents[1]
_SHARED = ("app.css", "app.js", "icon.svg")  # of the page of `serve`; there are no maps of attention
# Largest difference of a logit, over the largest logit, of a browser's answer to the probe.
_LIMITS = {"float32": 1e-3, "float16": 1e-3, "int8": 0.1}


def write_page(folder: Path) -> None:
    """Write index.html and static/ into an export; what is compiled is packed, as plain servers pack nothing."""
    static, shared, own = folder / "static", _PACKAGE / "serve/static", _PACKAGE / "export/page"
    (static / "runtime").mkdir(parents=True)
    for file in (*(shared / name for name in _SHARED), *own.glob("*.js")):
        shutil.copyfile(file, static / file.name)
    for file in (own / "runtime").iterdir():
        name = file.name.removesuffix(".xz")
        content = file.read_bytes() if name == file.name else lzma.decompress(file.read_bytes())
        if name.endswith(".wasm"):
            # Not named .gz: some servers would say that they packed it themselves.
            name, content = f"{Path(name).stem}.bin", gzip.compress(content, mtime=0)
        (static / "runtime" / name).write_bytes(content)
    page = (shared / "index.html").read_text(encoding="utf-8")
    (folder / "index.html").write_text(page.replace("static/attention.js", "static/local.js"), encoding="utf-8")


def measure_probe(compute: Compute, metadata: ModelMetadata) -> dict[str, Any]:
    """The logits of a picture of fixed numbers, which each browser must repeat before it answers."""
    numbers = np.arange(200 * 300 * 3, dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(24)
    picture = eval_reference(numbers.astype(np.uint8).reshape(200, 300, 3), metadata.preprocessing)
    return {"logits": compute(picture[None].numpy())[0].tolist(), "limit": _LIMITS[metadata.precision]}
