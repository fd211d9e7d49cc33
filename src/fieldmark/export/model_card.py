"""The model card of an export: what it is, what it was shown, how well it does, and where it should not be used.

Source:
    Mitchell et al., "Model Cards for Model Reporting", arXiv:1810.03993; the front matter is the Hub's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from fieldmark.inference.exported import ModelMetadata
from fieldmark.models.catalog import describe_pretraining
from fieldmark.study.report import markdown_text

if TYPE_CHECKING:
    from fieldmark.inference.calibration import Calibration
    from fieldmark.runs.folder import Run


def model_card(run: Run, metadata: ModelMetadata) -> str:
    """Markdown from what the run folder and the export measured; says so where something is not known."""
    from fieldmark.inference.calibration import load_calibration

    return write_card(
        metadata, data=run.data_info, summary=run.summary, calibration=load_calibration(run), recipe=_recipe(run)
    )


def write_card(
    metadata: ModelMetadata,
    *,
    data: dict[str, Any],
    summary: dict[str, Any],
    calibration: Calibration | None,
    recipe: str,
) -> str:
    """Markdown from plain values; see `model_card`."""
    sections = [
        _front_matter(metadata),
        f"# {markdown_text(metadata.run)}: {len(metadata.classes)} classes of photographs",
        _facts(metadata),
        "## Results\n\n" + _results(summary, data, calibration),
        "## Agreement with the run\n\n" + evidence_text(metadata.evidence),
        "## Data\n\n" + _data(data),
        "## Weights\n\n" + _weights(metadata),
        "## Limits\n\n" + _limits(metadata),
        f"## Classes\n\n{', '.join(markdown_text(name) for name in metadata.classes)}",
        f"## Recipe\n\n<details>\n<summary>All settings</summary>\n\n{_fenced(without_folders(recipe))}\n\n</details>",
        _use(metadata),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(metadata: ModelMetadata) -> str:
    # JSON strings are YAML strings, so a licence or a name with a colon cannot break the front matter.
    library = "timm" if metadata.kind == "timm" else "fieldmark"
    return (
        f"---\nlibrary_name: {library}\npipeline_tag: image-classification\n"
        f"license: {json.dumps(metadata.licence)}\ntags:\n- image-classification\n- {library}\n---"
    )


def _facts(metadata: ModelMetadata) -> str:
    spec = metadata.preprocessing
    picture = (
        f"short side to {int(spec['size'] / spec['crop_fraction'])} pixels, centre {spec['size']}×{spec['size']}"
        if spec["transform"] == "weights"
        else f"squashed to {spec['size']}×{spec['size']}"
    )
    unknown = (
        f'"unknown" below a probability of {metadata.threshold:.3f}'
        if metadata.threshold > 0
        else "every photo is answered, none is called unknown"
    )
    groups = metadata.groups()
    if groups:
        unknown += f"; then the finest of {', '.join(groups.taxonomy.levels[1:])} that is sure"
    rows = [
        ("Architecture", f"{metadata.architecture}, {metadata.parameters / 1e6:.2f} M parameters"),
        ("Form", f"{metadata.kind}, {metadata.precision}"),
        ("Input", f"RGB, upright by EXIF, {picture}, {spec['interpolation']}, antialiased"),
        ("Normalisation", f"mean {tuple(spec['mean'])}, standard deviation {tuple(spec['std'])} of values in 0 to 1"),
        ("Temperature", f"{metadata.temperature:.4f} (logits are divided by it)"),
        ("Answer", unknown),
    ]
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)


def _results(summary: dict[str, Any], data: dict[str, Any], calibration: Calibration | None) -> str:
    from fieldmark.inference.evaluation import METRIC_NAMES
    from fieldmark.training.metrics import wilson_interval

    judged: dict[str, Any] = summary.get("val", {})
    if not judged:
        return "The run folder holds no results."
    count = sum(splits.get("val", 0) for splits in data.get("counts", {}).values())
    rows: list[tuple[str, str]] = []
    for key, name in METRIC_NAMES.items():
        if judged.get(key) is None:
            continue
        interval: Sequence[float] | None = judged.get(f"{key}_interval")
        if interval is None and key == "top5" and count:
            interval = wilson_interval(round(judged[key] * count), count)
        more = f" (95 % interval {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
        rows.append((name, _figure(judged[key]) + more))
    if calibration:
        rows += [
            ("log loss, calibrated", _figure(calibration.log_loss_after)),
            ("calibration error, calibrated", _figure(calibration.calibration_error_after)),
        ]
        if calibration.threshold > 0:
            rows.append(("photos that are answered", f"{calibration.coverage:.1%}"))
            rows.append(("right among the answered", f"{calibration.accuracy:.1%}"))
    photos = f"{count} validation photos" if count else "validation photos"
    chosen = (
        "which did not choose the weights"
        if summary.get("select") == "last"
        else "which chose the weights: that makes the figures a little flattering"
    )
    table = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows)
    crossed = " Calibrated figures are cross-fitted." if calibration else ""
    note = f"\n\n{markdown_text(str(summary['note']))}" if "note" in summary else ""  # of a soup
    return f"On {photos}, {chosen}.{crossed}\n\n| Figure | Value |\n|---|---|\n{table}{note}"


def evidence_text(evidence: dict[str, Any]) -> str:
    """What was measured when the model was exported, in one to three sentences."""
    text = _describe_proof(evidence)
    if "predict" in evidence:
        row = evidence["predict"]
        text += (
            f" The run itself answers in {row['precision']} on the machine that exported it: `fieldmark predict` names "
            f"{row['same_answer']:.1%} of {row['photos']} photos alike by both, and a probability differs by at most "
            f"{row['largest_difference']:.3f}."
        )
    return text


def _describe_proof(evidence: dict[str, Any]) -> str:
    if "int8" in evidence:
        row = evidence["int8"]
        points = 100 * row["loss"]
        change = "no loss" if points == 0 else f"a {'loss' if points > 0 else 'gain'} of {abs(points):.2f} points"
        return (
            f"int8, calibrated on {row['calibration_photos']} validation photos, evaluated on {row['photos']} others: "
            f"accuracy {row['reference']:.2%} before, {row['quantized']:.2%} after, {change} (a loss of "
            f"{100 * row['limit']:.2f} was allowed). Right only before: {row['worse']} photos; only after: "
            f"{row['better']}."
        )
    if "parity" in evidence:
        row = evidence["parity"]
        if row["largest_difference"] == 0:
            return f"On {row['photos']} validation photos the logits are the same to the last bit."
        return (
            f"On {row['photos']} validation photos logits differ by at most {row['largest_difference']:.2e} "
            f"({row['relative_difference']:.3%} of the largest); the answer is the same on {row['same_answer']:.1%}."
        )
    return "Not measured."


def _data(data: dict[str, Any]) -> str:
    counts: dict[str, dict[str, int]] = data.get("counts", {})
    totals: dict[str, int] = {}
    for per_split in counts.values():
        for split, count in per_split.items():
            totals[split] = totals.get(split, 0) + count
    if not totals:
        return "The run folder does not say how many photos there were."
    listed = ", ".join(f"{count} {split or 'without split'}" for split, count in totals.items())
    smallest = min(counts, key=lambda name: sum(counts[name].values()))
    return (
        f"{len(counts)} classes; photos: {listed}. The smallest class is {markdown_text(smallest)} with "
        f"{sum(counts[smallest].values())} photos. Fingerprint `{data.get('fingerprint', 'unknown')}`."
    )


def _weights(metadata: ModelMetadata) -> str:
    text = f"Training started from weights under the licence **{markdown_text(metadata.licence)}**"
    seen = describe_pretraining(metadata.pretraining, default=metadata.pretraining)
    text += f", pre-trained on: {markdown_text(seen)}."
    if "nc" in metadata.licence.lower().replace("_", "-").split("-"):
        text += " That licence forbids commercial use, of this model too."
    return text


def _limits(metadata: ModelMetadata) -> str:
    lines = [
        "It knows only the classes below and was shown nothing else: a photo of something else gets one of these names"
        + (', or "unknown" where the probability is low, which is not certain.' if metadata.threshold else "."),
        "Figures hold for photos like those it was judged on: same source, same share of classes.",
        "Probabilities were "
        + ("calibrated on validation photos." if metadata.temperature != 1 else "not calibrated: they may overstate."),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _use(metadata: ModelMetadata) -> str:
    if metadata.kind == "timm":
        code = 'import timm\n\nmodel = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()'
        push = "\n\nTo share it: `hf upload USER/NAME THIS_FOLDER`."
        return f"## Use\n\n```python\n{code}\n```{push}"
    code = 'import fieldmark\n\npredictor = fieldmark.Predictor.load("THIS_FOLDER")\npredictor("photo.jpg").top(3)'
    return (
        f"## Use\n\n```python\n{code}\n```\n\nWithout Fieldmark: `{metadata.file}` with the steps in `fieldmark.json`."
    )


def _recipe(run: Run) -> str:
    path = run.path / "recipe.toml"
    return path.read_text(encoding="utf-8") if path.is_file() else "The run folder has no recipe."


def without_folders(recipe: str) -> str:
    """A recipe for strangers: of files and folders of this machine it has the name only.

    >>> without_folders('path = "/home/ada/photos/birds"')
    'path = "birds"'
    """

    def name(found: re.Match[str]) -> str:
        return f'{found[1]}"{PureWindowsPath(PurePosixPath(found[2]).name).name}"'

    return re.sub(r'^(\w+ = )"((?:[/~]|[A-Za-z]:|\.\.)[^"\n]*)"', name, recipe, flags=re.MULTILINE)


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}toml\n{text.rstrip()}\n{fence}"
