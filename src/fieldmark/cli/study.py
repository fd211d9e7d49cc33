"""The verbs that turn runs into evidence: sweep, compare, report. `cli` adds them to its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fieldmark.cli.options import COMPARE, TRAIN, BareRay
from fieldmark.errors import RunError
from fieldmark.progress import format_seconds, open_progress

if TYPE_CHECKING:
    from fieldmark.study.compare import Comparison
    from fieldmark.study.sweep import SweepStatus


Runs = Annotated[list[Path], typer.Argument(help="Run folders, sweeps, or folders of them.")]
Metric = Annotated[Literal["top1", "macro_recall", "prior_top1", "log_loss"], typer.Option(help="What to compare by.")]
Split = Annotated[str, typer.Option("--split", help="val or test.")]
Against = Annotated[
    Path | None, typer.Option("--against", metavar="RUN", help="Compare each with this run alone, not every two.")
]


def add_verbs(app: typer.Typer) -> None:
    """Add the three verbs to the command line."""
    for verb in (compare, report):
        app.command(rich_help_panel=COMPARE)(verb)
    app.command(cls=BareRay, rich_help_panel=TRAIN)(sweep)


def sweep(
    grid: Annotated[str, typer.Argument(help="Grid file or name of a shipped one; a recipe with --vary or --seeds.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the runs (sweeps/NAME); again to go on.")] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", metavar="KEY=VALUE,VALUE", help="Try each value; several: all combinations."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Train each combination this many times.", min=1)] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Photos of all cells.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of all cells.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Cells at a time; default: one per device.", min=1)] = None,
    ray: Annotated[str | None, typer.Option("--ray", help="Address of a Ray cluster; '' starts one here.")] = None,
) -> None:
    """Train many runs from one plan.

    Finished cells are left alone, half-done ones resumed, missing ones trained. Exit code 2 if a cell failed.
    """
    from fieldmark.study.grid import vary_recipe
    from fieldmark.study.sweep import run_sweep

    plan = vary_recipe(grid, vary or (), seeds=seeds or 1) if vary or seeds else grid
    out = out or Path("sweeps") / Path(grid).stem
    with open_progress("sweep") as progress:
        shown = ""

        def show(status: SweepStatus) -> None:
            nonlocal shown
            if (line := _progress_line(status)) != shown:
                progress.message(line)
            shown = line

        status = run_sweep(plan, out, data=data, overrides=set_ or (), jobs=jobs, ray=ray, on_status=show)
    for cell in status.cells:
        typer.echo(f"{cell.state:9} {cell.name}" + (f": {cell.error}" if cell.error else ""))
    if status.failed:
        raise RunError(f"{len(status.failed)} of {status.total} cells failed; their output is in {out}/.sweep")
    typer.echo(f"next: fieldmark report {out} --out report.html")


def compare(
    runs: Runs,
    metric: Metric = "top1",
    split: Split = "val",
    against: Against = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a table for a paper or a page.")] = False,
) -> None:
    """Say which runs are better, and how sure that is."""
    from fieldmark.study.compare import compare_runs

    comparison = compare_runs(runs, metric=metric, split=split, against=against)
    if as_json:
        typer.echo(json.dumps(comparison.as_dict(), indent=2))
    elif markdown:
        from fieldmark.study.report import effects_table, markdown_table, pairs_table

        typer.echo(markdown_table(effects_table(comparison) if comparison.baseline else pairs_table(comparison)))
    else:
        typer.echo(format_comparison(comparison))


def report(
    runs: Runs,
    out: Annotated[Path, typer.Option("--out", help="Page to write: .html, or .md with PNG beside it.")] = Path(
        "report.html"
    ),
    metric: Metric = "top1",
    split: Split = "val",
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "",
    photos: Annotated[bool, typer.Option("--photos/--no-photos", help="Show the most confused photos.")] = True,
) -> None:
    """Write one page that shows the results of runs."""
    from fieldmark.study.report import write_report

    for path in write_report(runs, out, metric=metric, split=split, title=title, with_photos=photos):
        typer.echo(f"wrote {path}")


def format_comparison(comparison: Comparison) -> str:
    """A table of the variants, and a sentence for every two of them."""
    width = max(len(variant.name) for variant in comparison.variants)
    lines = [f"{comparison.metric} on {comparison.num_photos} photos, {comparison.level:.0%} intervals"]
    for variant in comparison.variants:
        seeds = len(variant.seeds)
        interval = variant.interval
        lines.append(
            f"  {variant.name:{width}}  {interval.estimate:.3f} ({interval.low:.3f} to {interval.high:.3f}), "
            f"{seeds} seed{'s' * (seeds > 1)}"
        )
    return "\n".join([*lines, *(pair.verdict for pair in comparison.pairs), *comparison.notes])


def _progress_line(status: SweepStatus) -> str:
    running = ", ".join(f"{cell.name} {cell.epoch}/{cell.epochs}" for cell in status.cells if cell.state == "running")
    left = f", {format_seconds(status.seconds_left)} to finish" if status.seconds_left is not None else ""
    failed = f", {len(status.failed)} failed" if status.failed else ""
    return f"{status.num('finished')}/{status.total} cells{failed}{left}" + (f" | {running}" if running else "")
