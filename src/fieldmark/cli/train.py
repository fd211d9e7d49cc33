"""The verbs that train one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fieldmark.cli.options import (
    TRAIN,
    BatchSize,
    Device,
    Epochs,
    Json,
    LearningRate,
    ModelName,
    NewRun,
    Overrides,
    RecipeOrTime,
    Seed,
    Size,
    Track,
    complete_run,
    flag_overrides,
    print_result,
    read_settings,
)
from fieldmark.progress import open_progress

if TYPE_CHECKING:
    from fieldmark.config import Config
    from fieldmark.progress import Progress


def add_verbs(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    for verb in (demo, train):
        app.command(rich_help_panel=TRAIN)(verb)


def demo(
    out: NewRun = None,
    set_: Overrides = None,
) -> None:
    """Train on real photos in a few minutes.

    Solar cells, functional or defective: probe, fine-tune, judge, predict.
    """
    from fieldmark.demo import run_demo
    from fieldmark.runs.train import free_folder

    with open_progress("demo") as progress:
        typer.echo(run_demo(out or free_folder(Path("runs/demo")), overrides=set_ or (), progress=progress))


def train(
    data: Annotated[Path | None, typer.Argument(help="Folder of class folders, or a table.")] = None,
    recipe: RecipeOrTime = None,
    out: NewRun = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0.1, help="Make the best model that this time can make, and stop.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", help="Continue this run, with its own settings.", autocompletion=complete_run),
    ] = None,
    epochs: Epochs = None,
    model: ModelName = None,
    size: Size = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    seed: Seed = None,
    device: Device = None,
    track: Track = None,
    set_: Overrides = None,
    as_json: Json = False,
) -> None:
    """Train a model and write a run folder.

    With --minutes, or without a recipe, the plan is made by measuring: which backbones, sizes and views, and how long.
    """
    short = flag_overrides(recipe, epochs=epochs, model=model, size=size, batch_size=batch_size, lr=lr, seed=seed,
                           device=device, track=track)  # fmt: skip
    overrides = [*short, *(set_ or ())]
    if resume is not None and (data is not None or out is not None or overrides or recipe):
        raise typer.BadParameter("--resume takes settings, photos and folder from the run: give nothing else")
    run_training(data, recipe, out, overrides, minutes=minutes, resume=resume, as_json=as_json)


def run_training(
    data: Path | None,
    recipe: str | None,
    out: Path | None,
    overrides: list[str],
    *,
    minutes: float | None,
    resume: Path | None,
    as_json: bool,
) -> None:
    """Train by a recipe or within a time, and print the result."""
    from fieldmark.runs.environment import is_main_process
    from fieldmark.runs.folder import Run
    from fieldmark.runs.train import new_run_folder

    config = read_settings(recipe, data, overrides)
    folder = resume or out or new_run_folder(config, recipe or "minutes")
    with open_progress("train") as progress:
        if _has_budget(recipe, minutes, resume):
            result = _train_within(config, folder, minutes, is_new=resume is None, progress=progress)
        else:
            result = _train_recipe(config, folder, is_new=resume is None, progress=progress)
    if is_main_process():
        print_result({"run": str(folder), **Run(folder).summary}, result, as_json=as_json)


def _has_budget(recipe: str | None, minutes: float | None, resume: Path | None) -> bool:
    from fieldmark.budget.run import is_budgeted

    if resume is None:
        return minutes is not None or recipe is None
    if minutes is not None and not is_budgeted(resume):
        raise typer.BadParameter(f"{resume} was not trained within a budget: --resume goes on with its own recipe")
    return is_budgeted(resume)


def _train_within(config: Config, folder: Path, minutes: float | None, *, is_new: bool, progress: Progress) -> str:
    from fieldmark.budget import run as budget

    if not is_new:
        return budget.format_result(budget.resume_within(folder, minutes=minutes, progress=progress))
    if minutes is None:
        minutes = budget.machine_minutes(config)
        progress.message(f"no recipe and no --minutes: taking {minutes:g} minutes, which suit this machine")
    return budget.format_result(budget.train_within(config, folder, minutes=minutes, progress=progress))


def _train_recipe(config: Config, folder: Path, *, is_new: bool, progress: Progress) -> str:
    from fieldmark.runs import train as runs
    from fieldmark.runs.environment import is_main_process

    reports = runs.train(config, folder, progress=progress) if is_new else runs.resume(folder, progress=progress)
    for report in reports:
        if is_main_process():
            progress.message(runs.format_epoch(report))
    return runs.format_result(runs.Run(folder)) if is_main_process() else ""
