"""The model card of an export: what it is, what it was shown, how well it does, and where it should not be used.

Source:
    Mitchell et al., "Model Cards for Model Reporting", arXiv:1810.03993; the front matter is the Hub's.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from fieldmark.inference.calibration import load_calibration
from fieldmark.inference.evaluation import METRIC_NAMES
from fieldmark.inference.exported import ModelMetadata
from fieldmark.models.catalog import describe_pretraining
from fieldmark.models.weights import NON_COMMERCIAL
from fieldmark.runs.folder import RECIPE, Run
from fieldmark.study.report import render_template
from fieldmark.training.metrics import wilson_interval


def model_card(run: Run, metadata: ModelMetadata) -> str:
    """Markdown from what the run folder and the export measured; says so where something is not known."""
    recipe = without_folders((run.path / RECIPE).read_text(encoding="utf-8")).rstrip()
    counts: dict[str, dict[str, int]] = run.data_info.get("counts", {})
    num_val = sum(splits.get("val", 0) for splits in counts.values())
    scores: dict[str, Any] = run.summary.get("val", {})
    intervals = {"top1": scores.get("top1_interval")}
    if num_val and "top5" in scores:
        intervals["top5"] = wilson_interval(round(scores["top5"] * num_val), num_val)
    shown = {key: name for key, name in METRIC_NAMES.items() if key != "top5" or len(metadata.classes) > 5}
    page = {
        "model": metadata,
        "library": "timm" if metadata.kind == "timm" else "fieldmark",
        "spec": metadata.preprocessing,
        "levels": metadata.back_off.levels[1:] if metadata.back_off else (),
        "metrics": [(name, scores[key], intervals.get(key)) for key, name in shown.items() if key in scores],
        "num_val": num_val,
        "select": run.summary.get("select"),
        "note": run.summary.get("note"),  # of a soup
        "calibration": load_calibration(run),
        "evidence": evidence_text(metadata.evidence),
        "counts": counts,
        "totals": sum(map(Counter[str], counts.values()), Counter[str]()),
        "smallest": min(counts, key=lambda name: sum(counts[name].values()), default=""),
        "fingerprint": run.data_info.get("fingerprint", "unknown"),
        "pretraining": describe_pretraining(metadata.pretraining, default=metadata.pretraining),
        "is_non_commercial": NON_COMMERCIAL.search(metadata.license) is not None,
        "recipe": recipe,
        "fence": "`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0)),
    }
    return render_template("fieldmark.export", "model_card.md", page)


def evidence_text(evidence: dict[str, Any]) -> str:
    """What was measured when the model was exported, in one to three sentences."""
    known = dict.fromkeys(("int8", "parity", "predict")) | evidence
    return render_template("fieldmark.export", "evidence.md", {"evidence": known}).rstrip("\n")


def without_folders(recipe: str) -> str:
    """A recipe for strangers: of files and folders of this machine it has the name only.

    >>> without_folders('path = "/home/ada/photos/birds"')
    'path = "birds"'
    """

    def name(found: re.Match[str]) -> str:
        return f'{found[1]}"{PureWindowsPath(PurePosixPath(found[2]).name).name}"'

    return re.sub(r'^(\w+ = )"((?:[/~]|[A-Za-z]:|\.\.)[^"\n]*)"', name, recipe, flags=re.MULTILINE)
