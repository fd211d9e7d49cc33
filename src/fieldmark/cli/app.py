"""The command line: each verb parses, calls and prints. Nothing else in the package prints.

Results go to stdout (`--json` for machines), progress and errors to stderr. Exit codes: 0 done, 1 a bug (with its
traceback) or nobody reading the results any more, 2 the user can mend it (one message), 130 stopped from the keyboard.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fieldmark.cli import study, use
from fieldmark.cli.options import BareRay
from fieldmark.errors import FieldmarkError, InterruptedRunError, ReportedElsewhereError
from fieldmark.progress import open_progress

if TYPE_CHECKING:
    from fieldmark.config import Config
    from fieldmark.progress import Progress


app = typer.Typer(
    name="fieldmark",
    help="From a folder of labelled photographs to the best classifier your time can buy.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Show settings.", no_args_is_help=True, rich_markup_mode=None)
recipes_app = typer.Typer(help="Shipped recipes.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")
app.add_typer(recipes_app, name="recipes")

Data = Annotated[Path, typer.Argument(help="Folder of class folders, or a table.")]
Recipe = Annotated[str, typer.Option("--recipe", help="Shipped recipe or TOML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
RunFolder = Annotated[Path, typer.Argument(help="Run folder that `fieldmark train` wrote.")]

DEFAULT_RECIPE = "strong"

# What a machine refuses, and a user can mend. Any other OSError is a bug and shows its traceback.
MACHINE_ERRORS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Make it readable and writable, or choose another place"),
    errno.EIO: "Look whether the disk is well",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EMFILE: "Allow more open files (ulimit -n)",
}


def main() -> None:
    """Run the command line; the one place where our errors become a message and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be valid text
    try:
        app()
    except InterruptedRunError as error:
        from fieldmark.runs.environment import is_main_process

        if is_main_process():
            typer.echo(str(error), err=True)
        sys.exit(130)
    except FieldmarkError as error:
        sys.exit(_report(error))
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        typer.echo(f"error: {where}{error.strerror}. {MACHINE_ERRORS[error.errno]}", err=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:  # typer's answer to Ctrl-C
            typer.echo("stopped by Ctrl-C", err=True)
        raise


def _report(error: FieldmarkError) -> int:
    """Print an error that no other process of the same training prints; give the exit code."""
    if not isinstance(error, ReportedElsewhereError):
        typer.echo(f"error: {error}", err=True)
    return 2


@app.command()
def check(data: Data, recipe: Recipe = DEFAULT_RECIPE, set_: Overrides = None, as_json: Json = False) -> None:
    """Look at the photos before training.

    Broken files, duplicates and leaks, small classes, what training would cost. Exit code 2 if something must be
    mended.
    """
    from fieldmark.runs.check import check_data, format_checkup

    with open_progress("check") as progress:
        checkup = check_data(_config(recipe, data, set_), progress=progress)
    _print_json(checkup.as_dict()) if as_json else typer.echo(format_checkup(checkup))
    if checkup.must_mend:
        raise typer.Exit(2)


@app.command()
def split(
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="Table to write (CSV: path,label,split,group).")],
    recipe: Recipe = DEFAULT_RECIPE,
    set_: Overrides = None,
) -> None:
    """Divide the photos and write the table."""
    from fieldmark.data.index import save_split_table
    from fieldmark.runs.dataset import prepare_dataset

    with open_progress("split") as progress:
        index = prepare_dataset(_config(recipe, data, set_).data, progress=progress).index
    save_split_table(index, out)
    for name, counts in index.counts().items():
        typer.echo(f"{name}: " + ", ".join(f"{number} {part}" for part, number in counts.items()))


@app.command()
def cache(data: Data, recipe: Recipe = DEFAULT_RECIPE, set_: Overrides = None) -> None:
    """Decode the photos once and keep them small.

    The first epoch is then as fast as the others; `train` does the same by itself.
    """
    from fieldmark.runs.build import fill_cache
    from fieldmark.runs.dataset import prepare_dataset

    config = _config(recipe, data, set_)
    with open_progress("cache") as progress:
        _, note = fill_cache(config, prepare_dataset(config.data, progress=progress), progress=progress)
    typer.echo(note)


@app.command()
def preview(
    recipe: Annotated[str, typer.Argument(help="Shipped recipe or TOML file.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="Picture to write (PNG).")] = Path("preview.png"),
    set_: Overrides = None,
) -> None:
    """Draw what the model will be shown.

    Also says what looks like a mistake in the recipe.
    """
    from fieldmark.runs.preview import preview_recipe

    with open_progress("preview") as progress:
        warnings = preview_recipe(_config(recipe, data, set_), out, progress=progress)
    for warning in warnings:
        typer.echo(f"warning: {warning}")
    typer.echo(f"wrote {out}")


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Part of a timm name, or a pattern such as '*resnet50*'.")] = "",
    as_json: Json = False,
) -> None:
    """List pre-trained models.

    Without a pattern the short names alone.
    """
    from fieldmark.models.names import format_models, list_models

    rows = list_models(pattern)
    _print_json(rows) if as_json else typer.echo(format_models(rows))


@app.command("find-lr")
def find_lr(
    data: Data,
    out: Annotated[Path | None, typer.Option("--out", help="Picture of the sweep to write (PNG).")] = None,
    recipe: Recipe = DEFAULT_RECIPE,
    set_: Overrides = None,
    as_json: Json = False,
) -> None:
    """Suggest a learning rate.

    A short training with rising rates (arXiv:1506.01186); nothing of it is kept.
    """
    from fieldmark.runs.preview import save_sweep, search_lr

    with open_progress("find-lr") as progress:
        sweep = search_lr(_config(recipe, data, set_), progress=progress)
    if out is not None:
        save_sweep(sweep, out)
    if as_json:
        _print_json({"suggestion": sweep.suggestion, "steepest": sweep.steepest, "lrs": sweep.lrs,
                     "losses": sweep.losses, "smoothed": sweep.smoothed})  # fmt: skip
        return
    typer.echo(f"suggested: --set optim.lr={sweep.suggestion:.2g}  (steepest fall at {sweep.steepest:.2g})")


@app.command()
def train(
    data: Annotated[Path | None, typer.Argument(help="Folder of class folders, or a table.")] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Shipped recipe or TOML file; without one the time decides.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder to make; default: a new one in runs/.")] = None,
    set_: Overrides = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0.1, help="Make the best model that this time can make, and stop.")
    ] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Continue this run, with its own settings.")] = None,
    as_json: Json = False,
) -> None:
    """Train a model and write a run folder.

    With --minutes, or without a recipe, the plan is made by measuring: which backbones, sizes and views, and how long.
    """
    from fieldmark.runs.environment import is_main_process
    from fieldmark.runs.folder import Run
    from fieldmark.runs.train import new_run_folder

    if resume is not None and (data is not None or out is not None or set_ or recipe):
        raise typer.BadParameter("--resume takes settings, photos and folder from the run: give nothing else")
    config = _config(recipe, data, set_)
    folder = resume or out or new_run_folder(config, recipe or "minutes")
    with open_progress("train") as progress:
        if _has_budget(recipe, minutes, resume):
            result = _train_within(config, folder, minutes, is_new=resume is None, progress=progress)
        else:
            result = _train_recipe(config, folder, is_new=resume is None, progress=progress)
    if is_main_process():
        _print_json({"run": str(folder), **Run(folder).summary}) if as_json else typer.echo(result)


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


@app.command()
def evaluate(
    run: RunFolder,
    split: Annotated[str, typer.Option("--split", help="val, test or train.")] = "val",
    data: Annotated[Path | None, typer.Option("--data", help="Where the photos are now, if they moved.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for tables and pictures.")] = None,
    flips: Annotated[bool, typer.Option("--flips", help="As predict --flips would, and what that changes.")] = False,
    as_json: Json = False,
) -> None:
    """Judge a run on a labelled split.

    Accuracy with its interval, each class, confusion, calibration. Tables and pictures go to RUN/evaluation.
    """
    from fieldmark.inference.evaluation import evaluate_run, format_evaluation, make_output_folder, save_evaluation

    if out is not None:
        make_output_folder(out)
    with open_progress("evaluate") as progress:
        found = evaluate_run(run, split=split, data=data, flips=flips, progress=progress)
    paths = save_evaluation(found, out or run / "evaluation" / (f"{split}-flips" if flips else split))
    _print_json(found.as_dict()) if as_json else typer.echo(format_evaluation(found))
    typer.echo("wrote " + ", ".join(map(str, paths)), err=True)


@app.command(cls=BareRay)
def predict(
    model: Annotated[Path, typer.Argument(help="Run folder, or an exported model.")],
    photos: Annotated[str, typer.Argument(help="Folder of photos, one photo, a list or shards; path or URL.")],
    out: Annotated[Path | None, typer.Option("--out", help="File to write: .csv, .zip, .json or .parquet.")] = None,
    form: Annotated[
        Literal["short", "long", "leaderboard"] | None,
        typer.Option(
            "--form",
            help="short: label and top 3; long: all probabilities; leaderboard: image_name,pred_label. "
            "Default: short; leaderboard with --sample or for .zip.",
        ),
    ] = None,
    sample: Annotated[Path | None, typer.Option("--sample", help="Sample submission to hold the rows against.")] = None,
    sample_order: Annotated[bool, typer.Option("--sample-order", help="Write the rows in the sample's order.")] = False,
    path_column: Annotated[str, typer.Option("--path-column", help="Column of a list that holds the paths.")] = "path",
    flips: Annotated[bool, typer.Option("--flips", help="Average over each photo and its mirror image.")] = False,
    prior: Annotated[
        Literal["training", "estimate"],
        typer.Option("--prior", help="estimate: correct for other class shares than in training."),
    ] = "training",
    ray: Annotated[str | None, typer.Option("--ray", help="Share the work on a Ray cluster; alone, start one.")] = None,
    as_json: Json = False,
) -> None:
    """Name photos and write a prediction file.

    Every photo has exactly one row. One that cannot be read has an empty label, is named on stderr, and makes the exit
    code 2. With --ray the work is shared out in parts, and a second call computes only what is missing.
    """
    from fieldmark.inference.predict import predict_photos

    with open_progress("predict") as progress:
        done = predict_photos(
            model,
            photos,
            out,
            form=form,
            sample=sample,
            sample_order=sample_order,
            path_column=path_column,
            flips=flips,
            estimates_prior=prior == "estimate",
            progress=progress,
            ray=ray,
        )
    if out is None:
        _print_json(done.rows()) if as_json else typer.echo(done.table())
    elif as_json:
        _print_json(done.as_dict())
    else:
        typer.echo(f"wrote {done.count} rows to {out}")
    if done.prior:
        typer.echo(done.prior_message(), err=True)
    if done.failed:
        typer.echo(done.failure_message(), err=True)
        raise typer.Exit(2)


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option("--out", help="Folder to make; default: a new one in runs/.")] = None,
    set_: Overrides = None,
) -> None:
    """Train on real photos in a few minutes.

    Solar cells, functional or defective: probe, fine-tune, judge, predict.
    """
    from fieldmark.demo import run_demo
    from fieldmark.runs.train import free_folder

    with open_progress("demo") as progress:
        typer.echo(run_demo(out or free_folder(Path("runs/demo")), overrides=set_ or (), progress=progress))


@config_app.command("show")
def config_show(
    recipe: Annotated[str, typer.Argument(help="Shipped recipe or TOML file.")] = DEFAULT_RECIPE,
    set_: Overrides = None,
) -> None:
    """Print a recipe with every default filled in."""
    from fieldmark.config import dump_config

    typer.echo(dump_config(_config(recipe, None, set_)), nl=False)


@recipes_app.command("list")
def recipes_list() -> None:
    """Print names and purposes of the shipped recipes."""
    from fieldmark.config import load_config, recipe_names

    for name in recipe_names():
        typer.echo(f"{name:12}{load_config(name).description}")


study.add_verbs(app)
use.add_verbs(app)


def _config(recipe: str | None, data: Path | None, overrides: list[str] | None) -> Config:
    from fieldmark.config import load_config

    config = load_config(recipe, overrides or ())
    if data is None:
        return config
    # Not an override: a folder named "1" or "true" must stay text.
    return config.model_copy(update={"data": config.data.model_copy(update={"path": str(data)})})


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2))
