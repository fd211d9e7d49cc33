"""The model card of an export: what it is, what it was shown, how well it does, and where it should not be used.

Source:
    Mitchell et al., "Model Cards for Model Reporting", arXiv:1810.03993; the front matter is the Hub's.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fieldmark.outputs.metadata import ModelMetadata

if TYPE_CHECKING:
    from fieldmark.experiment.folder import Run


def model_card(run: Run, metadata: ModelMetadata) -> str:
    """Markdown from what the run folder and the export measured; says so where something is not known."""
    return write_card(metadata, data=run.data_info, summary=run.summary, recipe=_recipe(run))


def write_card(metadata: ModelMetadata, *, data: dict[str, Any], summary: dict[str, Any], recipe: str) -> str:
    """Markdown from plain values; see `model_card`."""
    sections = [
        _front_matter(metadata),
        f"# {_inline(metadata.run)}: {len(metadata.classes)} classes of photographs",
        _facts(metadata),
        "## Results\n\n" + _results(summary),
        "## Agreement with the run\n\n" + evidence_text(metadata.evidence),
        "## Data\n\n" + _data(data),
        "## Weights\n\n" + _weights(metadata),
        "## Limits\n\n" + _limits(metadata),
        f"## Classes\n\n{', '.join(_inline(name) for name in metadata.classes)}",
        f"## Recipe\n\n{_fenced(recipe)}",
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
    rows = [
        ("Architecture", f"{metadata.architecture}, {metadata.parameters / 1e6:.2f} M parameters"),
        ("Form", f"{metadata.kind}, {metadata.precision}"),
        ("Input", f"RGB, upright by EXIF, {picture}, {spec['interpolation']}, antialiased"),
        ("Normalisation", f"mean {tuple(spec['mean'])}, standard deviation {tuple(spec['std'])} of values in 0 to 1"),
        ("Temperature", f"{metadata.temperature:.4f} (logits are divided by it)"),
        ("Answer", unknown),
    ]
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)


def _results(summary: dict[str, Any]) -> str:
    metrics = _flat({key: value for key, value in summary.items() if key not in ("status",)})
    if not metrics:
        return "The run folder holds no results."
    rows = "\n".join(f"| {_cell(name)} | {_cell(_figure(value))} |" for name, value in metrics.items())
    return (
        "Of the kept weights, as the run's summary has them. Validation photos chose the weights unless the recipe's "
        "`train.select` is `last`, which makes their figures a little flattering.\n\n| Figure | Value |\n|---|---|\n"
        + rows
    )


def evidence_text(evidence: dict[str, Any]) -> str:
    """What was measured when the model was exported, in one or two sentences."""
    if "int8" in evidence:
        row = evidence["int8"]
        return (
            f"int8, calibrated on {row['calibration_photos']} validation photos and judged on {row['photos']} others: "
            f"accuracy {row['reference']:.2%} before, {row['quantized']:.2%} after, a loss of {100 * row['loss']:.2f} "
            f"points (allowed {100 * row['limit']:.2f}). {row['worse']} photos were right only before, {row['better']} "
            "only after."
        )
    if "parity" in evidence:
        row = evidence["parity"]
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
        f"{len(counts)} classes; photos: {listed}. The smallest class is {_inline(smallest)} with "
        f"{sum(counts[smallest].values())} photos. Fingerprint `{data.get('fingerprint', 'unknown')}`."
    )


def _weights(metadata: ModelMetadata) -> str:
    text = f"Training started from weights under the licence **{_inline(metadata.licence)}**"
    text += f", pre-trained on: {_inline(metadata.pretraining)}."
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


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def _figure(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " to ".join(_figure(item) for item in value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _inline(text: str) -> str:
    """Text that Markdown and HTML leave alone, on one line."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#" else letter for letter in flat)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}toml\n{text.rstrip()}\n{fence}"
