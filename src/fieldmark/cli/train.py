"""The verbs that train, and those that turn runs into evidence: demo, train, extend, sweep, compare, report."""

from __future__ import annotations

import time
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fieldmark.cli.options import (
    DEFAULT_RECIPE,
    Data,
    Json,
    NewRun,
    Overrides,
    Ray,
    RunFolder,
    RunFolders,
    complete_recipe,
    complete_run,
    flag_overrides,
    print_result,
    quick_imports,
    read_settings,
)
from fieldmark.errors import RunError, command
from fieldmark.progress import format_seconds, open_progress

if TYPE_CHECKING:
    from fieldmark.study.sweep import SweepStatus

STARTED = time.monotonic()
"""About when the command began: what follows, imports too, is inside of a budget."""

Metric = Annotated[Literal["top1", "macro_recall", "prior_top1", "log_loss"], typer.Option(help="What to compare by.")]
Split = Annotated[str, typer.Option("--split", help="val or test.")]


def demo(
    out: NewRun = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Time to train for.")] = 3.0,
    set_: Overrides = None,
) -> None:
    """Train on real photos in a few minutes.

    Solar cells, functional or defective: the best model that the minutes can make, evaluated on photos kept apart.
    """
    from fieldmark.demo import run_demo
    from fieldmark.runs.train import free_folder

    with open_progress("demo") as progress:
        told = run_demo(out or free_folder(Path("runs/demo")), minutes=minutes, overrides=set_ or (), progress=progress)
    typer.echo(told)


def train(
    data: Annotated[str | None, typer.Argument(help="Folder of class folders, a table or shards; path or URL.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Shipped recipe or TOML file; without one the time decides.", autocompletion=complete_recipe),
    ] = None,
    out: NewRun = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Make the best model that this time can make, and stop.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to continue.", autocompletion=complete_run)] = None,
    moved: Annotated[str | None, typer.Option("--data", help="With --resume: where its photos are now.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Short for --set train.epochs=N.")] = None,
    model: Annotated[str | None, typer.Option(help="Short for --set model.name=NAME.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the training photos (augment.size), in pixels.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Short for --set train.batch_size=N.")] = None,
    lr: Annotated[float | None, typer.Option(help="Short for --set optim.lr=RATE.")] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set train.seed=N.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps (train.device).")] = None,
    track: Annotated[list[str] | None, typer.Option(help="tensorboard, wandb or mlflow; may be repeated.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Serve the report of the training while it runs.")] = False,
    ray: Ray = None,
    workers: Annotated[int | None, typer.Option(help="With --ray: processes that train together.", min=1)] = None,
    set_: Overrides = None,
    as_json: Json = False,
) -> None:
    """Train a model and write a run folder.

    With --minutes, or without a recipe, the plan is made by measuring: which backbones, sizes and views, and how long.
    """
    if ray is not None and minutes is not None:
        raise typer.BadParameter("--ray takes a --recipe; --minutes go with train.devices=N or torchrun")
    if resume is None and (ray is None) != (workers is None):
        raise typer.BadParameter("--ray and --workers N go together: N processes on the cluster train one model")
    recipe = DEFAULT_RECIPE if workers and recipe is None else recipe
    short = flag_overrides(recipe, epochs=epochs, model=model, size=size, batch_size=batch_size, lr=lr, seed=seed,
                           device=device, devices=workers, track=track)  # fmt: skip
    overrides = [*short, *(set_ or ())]
    if resume is not None and (data is not None or out is not None or overrides or recipe):
        raise typer.BadParameter("--resume takes all from the run: give nothing else but --data, --minutes or --ray")
    if moved is not None and resume is None:
        raise typer.BadParameter("--data goes with --resume: give the photos of a new run as DATA")
    run_training(data or moved, recipe, out, overrides, minutes=minutes, resume=resume, ray=ray, watch=watch,
                 as_json=as_json)  # fmt: skip


def run_training(
    data: str | None,
    recipe: str | None,
    out: Path | None,
    overrides: list[str],
    *,
    minutes: float | None,
    resume: Path | None,
    ray: str | None,
    watch: bool,
    as_json: bool,
) -> None:
    """Train by a recipe or within a time, and print the result."""
    with quick_imports():
        import_module("timm")  # wanted in any case, a little later
        from fieldmark.budget import run as budget
        from fieldmark.runs import train as runs
        from fieldmark.runs.environment import is_main_process

    config = read_settings(recipe, data, overrides)
    has_budget = (resume / budget.PLAN).is_file() if resume else minutes is not None or recipe is None
    if minutes is not None and not has_budget:
        raise typer.BadParameter(f"{resume} was not trained within a budget: --resume goes on with its own recipe")
    if resume and has_budget and (data or ray is not None):
        raise typer.BadParameter(f"{resume} was trained within a budget: --ray and --data don't go with that")
    path = resume or out or runs.new_run_folder(config, recipe or "minutes")
    with open_progress("train") as progress:
        if watch and is_main_process():
            from fieldmark.study.watch import start_watching

            progress.message(f"the report of this training, as it goes: {start_watching(path)}")
        if ray is not None:
            from fieldmark.runs.workers import train_on_ray

            train_on_ray(config, path, address=ray, is_new=resume is None, data=data, progress=progress)
        elif not has_budget:
            resumed = runs.resume(path, data=data, progress=progress)
            for report in resumed if resume else runs.train(config, path, progress=progress):
                if is_main_process():
                    progress.message(runs.format_epoch(report))
        elif resume:
            budget.resume_within(path, minutes=minutes, progress=progress)
        else:
            budget.require_no_epochs(config, recipe)
            spent = time.monotonic() - STARTED
            budget.train_within(config, path, minutes=minutes, spent_seconds=spent, progress=progress)
    if is_main_process():
        run = runs.Run(path)
        result = budget.format_result(run) if has_budget else runs.format_result(run)
        print_result({"run": str(path), **run.summary}, result, as_json=as_json)


def extend(
    run: RunFolder,
    photos: Data,
    out: NewRun = None,
    force: Annotated[bool, typer.Option("--force", help="Also where the old classes lose accuracy.")] = False,
    as_json: Json = False,
) -> None:
    """Teach a run new photos and classes.

    Its backbone stays and the head is fitted again, in minutes. What the old classes lose is measured.
    """
    from fieldmark.budget.extend import extend as extend_run
    from fieldmark.budget.extend import format_extended
    from fieldmark.runs.train import free_folder

    path = out or free_folder(Path("runs") / f"{run.resolve().name}-extended")
    with open_progress("extend") as progress:
        made = extend_run(run, photos, path, force=force, progress=progress)
    print_result({"run": str(path), **made.summary}, format_extended(made), as_json=as_json)


def sweep(
    grid: Annotated[str, typer.Argument(help="Grid file or name of a shipped one; a recipe with --vary or --seeds.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the runs (sweeps/NAME); again to go on.")] = None,
    vary: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE,VALUE", help="Try each value; several: all combinations.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Train each combination this many times.", min=1)] = None,
    data: Annotated[str | None, typer.Option(help="Photos of all cells.")] = None,
    set_: Overrides = None,
    jobs: Annotated[int | None, typer.Option(help="Cells at a time; default: one per device.", min=1)] = None,
    ray: Ray = None,
) -> None:
    """Train many runs from one plan.

    Finished cells are left alone, half-done ones resumed, missing ones trained. Exit code 2 if a cell failed.
    """
    from fieldmark.study.grid import vary_recipe
    from fieldmark.study.sweep import run_sweep

    plan = vary_recipe(grid, vary or (), seeds=seeds) if vary or seeds else grid
    out = out or Path("sweeps") / Path(grid).stem
    with open_progress("sweep") as progress:
        tell = cache(progress.message)  # each line once
        status = run_sweep(
            plan, out, data=data, overrides=set_ or (), jobs=jobs, ray=ray, on_status=lambda now: tell(_describe(now))
        )
    for cell in status.cells:
        typer.echo(f"{cell.state:9} {cell.name}" + (f": {cell.error}" if cell.error else ""))
    if status.failed:
        raise RunError(f"{len(status.failed)} of {len(status.cells)} cells failed; their output is in {out}/.sweep")
    typer.echo(f"next: {command('report', out, '--out', 'report.html')}")


def compare(
    runs: RunFolders,
    metric: Metric = "top1",
    split: Split = "val",
    against: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Compare each with this run alone, not every two.")
    ] = None,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a table for a paper or a page.")] = False,
) -> None:
    """Say which runs are better, and how sure that is."""
    from fieldmark.study.compare import compare_runs

    comparison = compare_runs(runs, metric=metric, split=split, against=against)
    if markdown and not as_json:
        from fieldmark.study.report import effects_table, markdown_table, pairs_table

        typer.echo(markdown_table(effects_table(comparison) if comparison.baseline else pairs_table(comparison)))
    else:
        print_result(comparison.as_dict(), str(comparison), as_json=as_json)


def report(
    runs: RunFolders,
    out: Annotated[Path, typer.Option(help="Page to write: .html, or .md with PNG beside it.")] = Path("report.html"),
    metric: Metric = "top1",
    split: Split = "val",
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "",
    photos: Annotated[bool, typer.Option("--photos/--no-photos", help="Show the most confused photos.")] = True,
) -> None:
    """Write one page that shows the results of runs."""
    from fieldmark.study.report import write_report

    for path in write_report(runs, out, metric=metric, split=split, title=title, with_photos=photos):
        typer.echo(f"wrote {path}")


def _describe(status: SweepStatus) -> str:
    running = ", ".join(f"{cell.name} {cell.epoch}/{cell.epochs}" for cell in status.cells if cell.state == "running")
    left = f", {format_seconds(status.seconds_left)} to finish" if status.seconds_left is not None else ""
    failed = f", {len(status.failed)} failed" if status.failed else ""
    return f"{status.num('finished')}/{len(status.cells)} cells{failed}{left}" + (f" | {running}" if running else "")
