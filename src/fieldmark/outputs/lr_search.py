"""What `fieldmark find-lr` does: a run that is opened as for training, swept through rising rates, and thrown away."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
from torch import Tensor

from fieldmark.config import Config
from fieldmark.engine.loop import soft_cross_entropy
from fieldmark.experiment.dataset import Progress
from fieldmark.experiment.opening import begin, open_session
from fieldmark.experiment.session import Session
from fieldmark.files import whole_or_absent
from fieldmark.optim.finder import LrSweep, find_lr
from fieldmark.outputs import figures

LOWEST, HIGHEST = 1e-6, 1.0
UPDATES = 100
SMOOTHING = 0.9
EXPLOSION = 4.0


def search_lr(config: Config, *, progress: Progress) -> LrSweep:
    """Train for up to 100 updates with rates of the head from 1e-6 to 1, the other groups in proportion.

    The head starts untrained: a recipe that probes first bears the suggested rate as well, and often a higher one.

    Raises:
        FieldmarkError: As for training.
    """
    with tempfile.TemporaryDirectory(prefix="fieldmark-") as folder:
        session = open_session(config, Path(folder) / "run", start="new", progress=progress)
        begin(session)
        progress.start(UPDATES, 0)
        with session.loader:
            return find_lr(
                session.state.network,
                session.state.optimizer,
                _batches(session, progress),
                lambda logits, targets: soft_cross_entropy(logits, targets, None) / len(targets),
                backward=session.fabric.backward,
                min_lr=LOWEST,
                max_lr=HIGHEST,
                num_steps=UPDATES,
                smoothing=SMOOTHING,
                stop_ratio=EXPLOSION,
            )


def save_sweep(sweep: LrSweep, path: Path) -> None:
    """Draw loss over rate, with the suggestion, as PNG."""
    figure = figures.new_figure(6, 4)
    axes = figure.subplots()
    axes.plot(sweep.lrs, sweep.losses, color=figures.COLORS[0], alpha=0.3, label="loss")
    axes.plot(sweep.lrs, sweep.smoothed, color=figures.COLORS[0], label="smoothed")
    axes.axvline(sweep.suggestion, color=figures.COLORS[1], label=f"suggested: {sweep.suggestion:.2g}")
    axes.set_xscale("log")
    axes.set_ylim(top=float(np.quantile(sweep.smoothed, 0.95)) * 1.2)
    axes.set_xlabel("learning rate of the head")
    axes.set_ylabel("loss (nats)")
    axes.legend(frameon=False)
    whole_or_absent(path, lambda part: part.write_bytes(figures.figure_png(figure)))


def _batches(session: Session, progress: Progress) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in cycle(range(max(session.config.train.epochs, 1))):
        for batch in session.train_batches(epoch, 0):
            yield batch.images, batch.targets
            progress.advance(1)
