"""Several runs as one: an ensemble that averages answers, or a soup that averages weights.

Either is a run folder that predicts alone. Shape letters: N photos, K classes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import RunError
from fieldmark.experiment import combinable, folder
from fieldmark.outputs.combined_folder import (
    copy_description,
    copy_member,
    make_part,
    member_names,
    top1,
    write_model_info,
    write_summary,
)

if TYPE_CHECKING:
    from fieldmark.experiment.dataset import Progress
    from fieldmark.experiment.folder import Run

Method = Literal["ensemble", "soup"]

ENSEMBLE_NOTE = (
    "The members were chosen and calibrated with an eye on these photos: on photos that nothing has seen the accuracy "
    "may be lower."
)


def combine(
    runs: Sequence[Run | str | Path],
    out: str | Path,
    *,
    method: Method = "ensemble",
    max_parameters_millions: float | None = None,
    progress: Progress | None = None,
) -> Run:
    """Make one predictor of several finished runs.

    Args:
        runs: At least two runs or their folders, or folders of them such as a sweep, with the same classes and the
            same validation photos.
        out: Folder to make; must not exist. It predicts alone, wherever it is moved.
        method: `ensemble` answers with the mean of the members' calibrated probabilities, at the cost of asking each.
            `soup` is one model with the mean of the weights of those members that do not lower the validation accuracy
            (greedily, best first); it takes runs of one architecture, and the validation photos.
        max_parameters_millions: Budget for all parameters together; None is the smallest that a member's recipe names.
        progress: Where to tell how far the work is.

    Returns:
        What was made, as a run with its own validation figures.

    Raises:
        RunError: The runs do not fit together, or `out` exists.
        ConfigError: Too many parameters. Nothing was written.
        PhotoError: A validation photo that a soup needs broke or vanished.
    """
    from fieldmark.experiment.dataset import Quiet
    from fieldmark.experiment.folder import Run
    from fieldmark.outputs.soup import write_soup

    if method not in get_args(Method):
        raise RunError(f"no method {method!r}: choose one of {', '.join(get_args(Method))}")
    out = Path(out)
    if out.exists():
        raise RunError(f"{out} exists already; choose another --out, or remove it")
    members = combinable.open_combinable([run.path if isinstance(run, Run) else run for run in runs])
    if method == "soup":
        combinable.refuse_different_networks(members)
    # A soup is one model, however many it is made of.
    asked = members if method == "ensemble" else members[:1]
    counts = [(name, int(run.model_info["parameters"])) for name, run in zip(member_names(asked), asked, strict=True)]
    budget = combinable.check_budget(counts, members, max_millions=max_parameters_millions)
    summary = {
        "status": "finished",
        "combined": f"{method} of {len(members)}",
        "method": method,
        "parameters": sum(count for _, count in counts),
        "max_parameters_millions": budget,
    }
    part = make_part(out)
    try:
        if method == "soup":
            write_soup(members, part, summary, progress or Quiet())
        else:
            _write_ensemble(members, part, summary)
        part.chmod(0o755)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Run(out)


def format_combined(run: Run) -> str:
    """What was made, for people."""
    summary, val = run.summary, run.summary["val"]
    members: dict[str, dict[str, Any]] = summary["members"]
    budget = summary["max_parameters_millions"]
    allowed = "no budget was given" if budget is None else f"the budget is {budget:g} M"
    low, high = val["top1_interval"]
    width = max(map(len, members))
    lines = [f"{summary['combined']}: {run.path}, {summary['parameters'] / 1e6:.2f} M parameters in all ({allowed})"]
    for name, row in members.items():
        kept = "" if row.get("kept", True) else "  left out"
        temperature = f"  temperature {row['temperature']:.3f}" if "temperature" in row else ""
        lines.append(f"  {name:{width}}  top-1 {row['top1']:.4f}{temperature}{kept}")
    lines.append(f"validation: top-1 {val['top1']:.4f}, 95 % interval {low:.4f} to {high:.4f}")
    temperatures = {name: row.get("temperature", 1.0) for name, row in members.items()}
    as_they_are = [name for name, temperature in temperatures.items() if temperature == 1]
    if 0 < len(as_they_are) < len(members):
        lines.append(
            f"warning: {', '.join(as_they_are)} not calibrated, but the others are: the surest outvote the rest. "
            "Calibrate all members or none, and combine them again"
        )
    return "\n".join([*lines, summary["note"]])


def _write_ensemble(runs: Sequence[Run], part: Path, summary: dict[str, Any]) -> None:
    from fieldmark.experiment.ensemble import mean_probabilities
    from fieldmark.outputs.calibration import load_calibration

    started = time.perf_counter()
    first, names = runs[0], member_names(runs)
    stored = [run.predictions("val") for run in runs]
    calibrations = [load_calibration(run) for run in runs]
    temperatures = [found.temperature if found else 1.0 for found in calibrations]
    orders = [combinable.aligned_order(run, first.classes) for run in runs]
    place = {path: number for number, path in enumerate(stored[0].paths)}
    rows = [_in_order(found.paths, found.probabilities, place, run) for found, run in zip(stored, runs, strict=True)]
    for number, run in enumerate(runs):
        copy_member(run, part / folder.MEMBERS / str(number))
    copy_description(first, part)
    write_model_info(runs, part, {"parameters": summary["parameters"]})
    listed = [
        {"folder": str(number), "name": name, "temperature": temperature}
        for number, (name, temperature) in enumerate(zip(names, temperatures, strict=True))
    ]
    folder.write_json(part / folder.ENSEMBLE, {"members": listed})
    folder.write_predictions(
        part / "predictions" / "val.parquet",
        paths=stored[0].paths,
        labels=stored[0].labels,
        probabilities=mean_probabilities(rows, temperatures, orders),
        classes=first.classes,
    )
    described = {
        name: {"top1": top1(found.probabilities, found.labels), "temperature": temperature,
               "parameters": int(run.model_info["parameters"])}
        for name, found, temperature, run in zip(names, stored, temperatures, runs, strict=True)
    }  # fmt: skip
    seconds = time.perf_counter() - started
    write_summary(part, summary | {"seconds": seconds, "members": described, "note": ENSEMBLE_NOTE})


def _in_order(
    paths: Sequence[str], probabilities: NDArray[np.float32], place: dict[str, int], run: Run
) -> NDArray[np.float32]:
    """Rows in the order of the first member's photos."""
    if set(paths) != set(place):
        raise RunError(f"{run.path} stored predictions of other photos than it validates on: evaluate it again")
    rows = np.empty_like(probabilities)
    rows[[place[path] for path in paths]] = probabilities
    return rows
