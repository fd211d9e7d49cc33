"""The verbs before training: look at photos, models, recipes and the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fieldmark.cli.options import (
    DEFAULT_RECIPE,
    PREPARE,
    Data,
    Json,
    Overrides,
    Recipe,
    RecipeArgument,
    print_result,
    read_settings,
)
from fieldmark.progress import open_progress


def add_verbs(app: typer.Typer) -> None:
    """Add these verbs to the command line; what `check` and `train` do by themselves is not listed in the help."""
    for verb in (check, models, doctor):
        app.command(rich_help_panel=PREPARE)(verb)
    shown = typer.Typer(help="Show settings and recipes.", no_args_is_help=True, rich_markup_mode=None)
    shown.command("show")(config_show)
    shown.command("recipes")(recipes_list)
    app.add_typer(shown, name="config", rich_help_panel=PREPARE)
    recipes = typer.Typer(help="Shipped recipes.", no_args_is_help=True, rich_markup_mode=None)
    recipes.command("list")(recipes_list)
    app.add_typer(recipes, name="recipes", hidden=True)
    for verb in (preview, split, cache):
        app.command(hidden=True)(verb)
    app.command("find-lr", hidden=True)(find_lr)


def check(
    data: Data,
    recipe: Annotated[str | None, typer.Option("--recipe", help="Look at this recipe and its cost, too.")] = None,
    set_: Overrides = None,
    as_json: Json = False,
) -> None:
    """Look at the photos before training.

    Broken files, duplicates and leaks, small classes; with a recipe, its weights, mistakes and cost. Exit code 2 if
    something must be fixed.
    """
    from fieldmark.runs.check import check_data, format_checkup

    config = read_settings(recipe, data, set_)
    with open_progress("check") as progress:
        checkup = check_data(config, progress=progress, with_recipe=recipe is not None)
    if recipe is None:
        from fieldmark.budget.run import describe_plan

        typer.echo(describe_plan(config), err=as_json)
    print_result(checkup.as_dict(), format_checkup(checkup), as_json=as_json)
    if checkup.must_mend:
        raise typer.Exit(2)


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
        index = prepare_dataset(read_settings(recipe, data, set_).data, progress=progress).index
    save_split_table(index, out)
    for name, counts in index.counts().items():
        typer.echo(f"{name}: " + ", ".join(f"{number} {part}" for part, number in counts.items()))


def cache(data: Data, recipe: Recipe = DEFAULT_RECIPE, set_: Overrides = None) -> None:
    """Decode the photos once and keep them small.

    The first epoch is then as fast as the others; `train` does the same by itself.
    """
    from fieldmark.runs.build import fill_cache
    from fieldmark.runs.dataset import prepare_dataset

    config = read_settings(recipe, data, set_)
    with open_progress("cache") as progress:
        _, note = fill_cache(config, prepare_dataset(config.data, progress=progress), progress=progress)
    typer.echo(note)


def preview(
    recipe: RecipeArgument,
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="Picture to write (PNG).")] = Path("preview.png"),
    set_: Overrides = None,
) -> None:
    """Draw what the model will be shown.

    Also says what looks like a mistake in the recipe.
    """
    from fieldmark.runs.preview import preview_recipe

    with open_progress("preview") as progress:
        warnings = preview_recipe(read_settings(recipe, data, set_), out, progress=progress)
    for warning in warnings:
        typer.echo(f"warning: {warning}")
    typer.echo(f"wrote {out}")


def models(
    pattern: Annotated[str, typer.Argument(help="Part of a timm name, or a pattern such as '*resnet50*'.")] = "",
    as_json: Json = False,
) -> None:
    """List pre-trained models.

    Without a pattern the short names alone.
    """
    from fieldmark.models.catalog import format_models, list_models

    rows = list_models(pattern)
    print_result(rows, format_models(rows), as_json=as_json)


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
        sweep = search_lr(read_settings(recipe, data, set_), progress=progress)
    if out is not None:
        save_sweep(sweep, out)
    found = {name: getattr(sweep, name) for name in ("suggestion", "steepest", "lrs", "losses", "smoothed")}
    text = f"suggested: --set optim.lr={sweep.suggestion:.2g}  (steepest fall at {sweep.steepest:.2g})"
    print_result(found, text, as_json=as_json)


def config_show(
    recipe: RecipeArgument = DEFAULT_RECIPE,
    set_: Overrides = None,
    has_comments: Annotated[bool, typer.Option("--comments/--no-comments", help="Say what each means.")] = True,
) -> None:
    """Print a recipe with every default filled in, and what each setting means."""
    from fieldmark.config import dump_config

    typer.echo(dump_config(read_settings(recipe, None, set_), with_comments=has_comments), nl=False)


def recipes_list() -> None:
    """Print names and purposes of the shipped recipes."""
    from fieldmark.config import load_config, recipe_names

    for name in recipe_names():
        typer.echo(f"{name:12}{load_config(name).description}")


def doctor(as_json: Json = False) -> None:
    """Describe this machine and installation, to paste into a bug report.

    Versions, processor and GPU, weights at hand, extras, caches and disk, and whether the hub answers.
    """
    from fieldmark.cli.doctor import examine, format_findings

    found = examine()
    print_result(found, format_findings(found), as_json=as_json)
