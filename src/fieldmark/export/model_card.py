"""The model card of an export: what it is, what it was shown, how well it does, and where it should not be used.

Source:
    Mitchell et al., "Model Cards for Model Reporting", arXiv:1810.03993; the front matter is the Hub's.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from fieldmark.inference.exported import ModelMetadata
from fieldmark.models.catalog import describe_pretraining
from fieldmark.models.weights import NON_COMMERCIAL
from fieldmark.runs.folder import RECIPE
from fieldmark.study.report import markdown_text

if TYPE_CHECKING:
    from fieldmark.runs.folder import Run


def model_card(run: Run, metadata: ModelMetadata) -> str:
    """Markdown from what the run folder and the export measured; says so where something is not known."""
    recipe = without_folders((run.path / RECIPE).read_text(encoding="utf-8"))
    sections = [
        _front_matter(metadata),
        f"# {markdown_text(metadata.run)}: {len(metadata.classes)} classes of photographs",
        _facts(metadata),
        "## Results\n\n" + _results(run),
        "## Agreement with the run\n\n" + evidence_text(metadata.evidence),
        "## Data\n\n" + _data(run.data_info),
        "## Weights\n\n" + _weights(metadata),
        "## Limits\n\n" + _limits(metadata),
        f"## Classes\n\n{', '.join(markdown_text(name) for name in metadata.classes)}",
        f"## Recipe\n\n<details>\n<summary>All settings</summary>\n\n{_fenced(recipe)}\n\n</details>",
        "## Use\n\n" + _use(metadata),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(metadata: ModelMetadata) -> str:
    # JSON strings are YAML strings, so a license or a name with a colon cannot break the front matter.
    library = "timm" if metadata.kind == "timm" else "fieldmark"
    return (
        f"---\nlibrary_name: {library}\npipeline_tag: image-classification\n"
        f"license: {json.dumps(metadata.license)}\ntags:\n- image-classification\n- {library}\n---"
    )


def _facts(metadata: ModelMetadata) -> str:
    spec = metadata.eval_spec()
    size = f"{spec.size}×{spec.size}"
    is_cropped = spec.transform == "weights"
    picture = (
        f"short side to {int(spec.size / spec.crop_fraction)} pixels, center {size}"
        if is_cropped
        else f"squashed to {size}"
    )
    unknown = "every photo is answered, none is called unknown"
    if metadata.threshold > 0:
        unknown = f'"unknown" below a probability of {metadata.threshold:.3f}'
    if groups := metadata.groups():
        unknown += f"; then the finest of {', '.join(groups.taxonomy.levels[1:])} that is sure"
    rows = [
        ("Architecture", f"{metadata.architecture}, {metadata.parameters / 1e6:.2f} M parameters"),
        ("Form", f"{metadata.kind}, {metadata.precision}"),
        ("Input", f"RGB, upright by EXIF, {picture}, {spec.interpolation}, antialiased"),
        ("Normalization", f"mean {tuple(spec.mean)}, standard deviation {tuple(spec.std)} of values in 0 to 1"),
        ("Temperature", f"{metadata.temperature:.4f} (logits are divided by it)"),
        ("Answer", unknown),
    ]
    return _table("| | |", rows)


def _results(run: Run) -> str:
    from fieldmark.inference.calibration import load_calibration
    from fieldmark.inference.evaluation import METRIC_NAMES
    from fieldmark.training.metrics import wilson_interval

    summary, calibration = run.summary, load_calibration(run)
    scores: dict[str, Any] = summary.get("val", {})
    if not scores:
        return "The run folder holds no results."
    count = sum(splits.get("val", 0) for splits in run.data_info.get("counts", {}).values())
    rows: list[tuple[str, str]] = []
    for key, name in METRIC_NAMES.items():
        if (score := scores.get(key)) is None:
            continue
        interval = scores.get(f"{key}_interval")
        if interval is None and key == "top5" and count:
            interval = wilson_interval(round(score * count), count)
        more = f" (95 % interval {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
        rows.append((name, (f"{score:.4f}" if isinstance(score, float) else str(score)) + more))
    if calibration:
        rows.append(("log loss, calibrated", f"{calibration.log_loss_after:.4f}"))
        rows.append(("calibration error, calibrated", f"{calibration.calibration_error_after:.4f}"))
        if calibration.threshold > 0:
            rows.append(("photos that are answered", f"{calibration.coverage:.1%}"))
            rows.append(("right among the answered", f"{calibration.accuracy:.1%}"))
    photos = f"{count} validation photos" if count else "validation photos"
    chosen = "which chose the weights: that makes the metrics slightly optimistic"
    if summary.get("select") == "last":
        chosen = "which did not choose the weights"
    crossed = " Calibrated metrics are cross-fitted." if calibration else ""
    note = f"\n\n{markdown_text(str(summary['note']))}" if "note" in summary else ""  # of a soup
    return f"On {photos}, {chosen}.{crossed}\n\n{_table('| Figure | Value |', rows)}{note}"


def evidence_text(evidence: dict[str, Any]) -> str:
    """Return what was measured when the model was exported, in one to three sentences."""
    text = "Not measured."
    if row := evidence.get("int8"):
        points = 100 * row["loss"]
        change = "no loss" if points == 0 else f"a {'loss' if points > 0 else 'gain'} of {abs(points):.2f} points"
        text = (
            f"int8, calibrated on {row['calibration_photos']} validation photos, evaluated on {row['photos']} others: "
            f"accuracy {row['reference']:.2%} before, {row['quantized']:.2%} after, {change} (a loss of "
            f"{100 * row['limit']:.2f} was allowed). Right only before: {row['worse']} photos; only after: "
            f"{row['better']}."
        )
    elif row := evidence.get("parity"):
        text = f"On {row['photos']} validation photos the logits are the same to the last bit."
        if row["largest_difference"]:
            text = (
                f"On {row['photos']} validation photos logits differ by at most {row['largest_difference']:.2e} "
                f"({row['relative_difference']:.3%} of the largest); the answer is the same on "
                f"{row['same_answer']:.1%}."
            )
    if row := evidence.get("predict"):
        text += (
            f" The run itself answers in {row['precision']} on the machine that exported it: `fieldmark predict` names "
            f"{row['same_answer']:.1%} of {row['photos']} photos alike by both, and a probability differs by at most "
            f"{row['largest_difference']:.3f}."
        )
    return text


def _data(data: dict[str, Any]) -> str:
    counts: dict[str, dict[str, int]] = data.get("counts", {})
    totals: Counter[str] = sum(map(Counter, counts.values()), Counter())
    if not totals:
        return "The run folder does not say how many photos there were."
    listed = ", ".join(f"{count} {split or 'without split'}" for split, count in totals.items())
    smallest = min(counts, key=lambda name: sum(counts[name].values()))
    return (
        f"{len(counts)} classes; photos: {listed}. The smallest class is {markdown_text(smallest)} with "
        f"{sum(counts[smallest].values())} photos. Fingerprint `{data.get('fingerprint', 'unknown')}`."
    )


def _weights(metadata: ModelMetadata) -> str:
    seen = describe_pretraining(metadata.pretraining, default=metadata.pretraining)
    text = (
        f"Training started from weights under the license **{markdown_text(metadata.license)}**, "
        f"pre-trained on: {markdown_text(seen)}."
    )
    if NON_COMMERCIAL.search(metadata.license):
        text += " That license forbids commercial use, of this model too."
    return text


def _limits(metadata: ModelMetadata) -> str:
    unknown = ', or "unknown" where the probability is low, which is not certain.' if metadata.threshold else "."
    is_calibrated = metadata.temperature != 1
    calibrated = "calibrated on validation photos." if is_calibrated else "not calibrated: they may overstate."
    return (
        "- It knows only the classes below and was shown nothing else: a photo of something else gets one of these "
        f"names{unknown}\n"
        "- Figures hold for photos like those it was evaluated on: same source, same share of classes.\n"
        f"- Probabilities were {calibrated}"
    )


def _use(metadata: ModelMetadata) -> str:
    if metadata.kind == "timm":
        code = 'import timm\n\nmodel = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()'
        more = "To share it: `hf upload USER/NAME THIS_FOLDER`."
    else:
        code = 'import fieldmark\n\npredictor = fieldmark.Predictor.load("THIS_FOLDER")\npredictor("photo.jpg").top(3)'
        more = f"Without Fieldmark: `{metadata.file}` with the steps in `fieldmark.json`."
    return f"```python\n{code}\n```\n\n{more}"


def without_folders(recipe: str) -> str:
    """A recipe for strangers: of files and folders of this machine it has the name only.

    >>> without_folders('path = "/home/ada/photos/birds"')
    'path = "birds"'
    """

    def name(found: re.Match[str]) -> str:
        return f'{found[1]}"{PureWindowsPath(PurePosixPath(found[2]).name).name}"'

    return re.sub(r'^(\w+ = )"((?:[/~]|[A-Za-z]:|\.\.)[^"\n]*)"', name, recipe, flags=re.MULTILINE)


def _table(head: str, rows: list[tuple[str, str]]) -> str:
    lines = [head, "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows)]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}toml\n{text.rstrip()}\n{fence}"
