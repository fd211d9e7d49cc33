"""What `fieldmark train` says: a line per epoch, and the result at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fieldmark.config import Config
    from fieldmark.engine.loop import EpochReport
    from fieldmark.experiment.folder import Run


def format_epoch(report: EpochReport) -> str:
    """One line; the accuracy on clean training batches is kept apart from the one on mixed batches."""
    name = "probe   " if report.step == 0 else f"epoch {report.epoch:3d}"
    parts = [f"{name}  loss {report.train_loss:.4f}"]
    if report.train_top1_clean is not None:
        parts.append(f"train {report.train_top1_clean:.4f}")
    if report.train_top1_mixed is not None:
        parts.append(f"train, mixed {report.train_top1_mixed:.4f}")
    if "top1" in report.metrics:
        parts.append(f"val top-1 {report.metrics['top1']:.4f}  val loss {report.metrics['log_loss']:.4f}")
    return "  ".join([*parts, f"lr {report.lr:.1e}", f"{report.seconds:.0f} s"])


def format_result(run: Run) -> str:
    """What a finished run came to, and what to do with it."""
    summary = run.summary
    lines = [f"run: {run.path}"]
    if "val" in summary:
        lines.append(f"validation: {format_accuracy(summary['val'])}  ({_kept(summary)})")
    lines += [
        "next:",
        f"  fieldmark evaluate {_quoted(run.path)}",
        f"  fieldmark predict {_quoted(run.path)} PHOTOS --out prediction.csv",
    ]
    return "\n".join(lines)


def format_accuracy(figures: dict[str, Any]) -> str:
    """Top-1 accuracy with its interval."""
    low, high = figures["top1_interval"]
    return f"top-1 {figures['top1']:.4f}, 95 % interval {low:.4f} to {high:.4f}"


def new_run_folder(config: Config, recipe: str) -> Path:
    """`runs/<data>-<recipe>`, or the same with a number behind it where that is taken."""
    return free_folder(Path("runs") / f"{Path(config.data.path).resolve().stem}-{Path(recipe).stem}")


def free_folder(folder: Path) -> Path:
    """`folder`, or the same with the first number behind it that is not taken."""
    free, number = folder, 1
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def _kept(summary: dict[str, Any]) -> str:
    if summary["select"] == "last":
        return "weights of the last epoch"
    if summary["best_epoch"] == 0:
        return f"weights of the probe, the best by {summary['metric']}"
    return f"weights of epoch {summary['best_epoch']}, the best by {summary['metric']}: biased upward by the choice"


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))
