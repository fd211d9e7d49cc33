"""The verbs before training: look at photos, models, recipes and the machine."""

import os
import re
import shutil
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from fieldmark.cli.options import DEFAULT_RECIPE, Data, Json, Overrides, Recipe, RecipeName, print_result, read_settings
from fieldmark.progress import open_progress

HUB_SECONDS = 3.0
NOT_FOR_USERS = ("test", "bench", "docs", "all")


def check(
    data: Data,
    recipe: Annotated[str | None, typer.Option(help="Look at this recipe and its cost, too.")] = None,
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
    if checkup.must_fix:
        raise typer.Exit(2)


def split(
    data: Data,
    out: Annotated[Path, typer.Option(help="Table to write (path,label,split,group): .csv or .parquet.")],
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


def pack(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of tar files to make, or to go on with.")],
    megabytes: Annotated[float, typer.Option(min=1, help="Size of a tar file, about.")] = 256,
    photos: Annotated[int | None, typer.Option(min=1, help="Photos in a tar file, whatever their size.")] = None,
    set_: Overrides = None,
) -> None:
    """Pack photos into tar files, to train from an object store.

    With their labels and splits. A call that was stopped goes on when it is repeated; each file is read again.
    """
    from fieldmark.data.packing import pack_photos
    from fieldmark.runs.dataset import find_photos

    with open_progress("pack") as progress:
        index = find_photos(read_settings(None, data, set_).data)
        tars, kept = pack_photos(index, out, max_bytes=megabytes * 1e6, max_photos=photos, progress=progress)
    typer.echo(f"packed {len(index)} photos into {tars} tar files in {out}; {kept} of these were there before")


def cache(data: Data, recipe: Recipe = DEFAULT_RECIPE, set_: Overrides = None) -> None:
    """Decode the photos once and keep them small.

    The first epoch is then as fast as the others; `train` does the same by itself.
    """
    from fieldmark.runs.build import fill_cache
    from fieldmark.runs.dataset import prepare_dataset

    config = read_settings(recipe, data, set_)
    with open_progress("cache") as progress:
        dataset = prepare_dataset(config.data, progress=progress, fill=partial(fill_cache, config))
    assert dataset.cached is not None
    typer.echo(dataset.cached[1])


def preview(
    recipe: RecipeName,
    data: Data,
    out: Annotated[Path, typer.Option(help="Picture to write (PNG).")] = Path("preview.png"),
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
    measures: Annotated[bool, typer.Option("--measure", help="Also time each here, two seconds each.")] = False,
    as_json: Json = False,
) -> None:
    """List pre-trained models.

    With ImageNet accuracy, size, cost and license; without a pattern those that are worth a look.
    """
    from fieldmark.models.catalog import format_models, list_models

    rows = list_models(pattern)
    for row in rows if measures else ():
        row["photos_per_second"] = measure_speed(row["name"], row["train_size"])
    print_result(rows, format_models(rows), as_json=as_json)


def measure_speed(name: str, size: int) -> float:
    """Photos of `size` pixels that a timm model answers in a second as `predict` would, in batches of eight."""
    import timm
    import torch

    from fieldmark.runs.check import measure_rate
    from fieldmark.training.evaluate import Device

    where = Device.choose("bf16-mixed")
    layout: Any = {"device": where.device, "memory_format": torch.channels_last}
    model = timm.create_model(name.partition(".")[0], pretrained=False).eval().to(**layout)
    images = torch.zeros(8, 3, size, size).to(**layout)
    with torch.inference_mode(), where.autocast():
        return round(measure_rate(lambda: len(model(images).cpu())), 1)  # waits for the device


def config_show(
    recipe: RecipeName = DEFAULT_RECIPE,
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
    from fieldmark.files import fill_template

    found = examine()
    print_result(found, fill_template("doctor.md", found), as_json=as_json)


def examine() -> dict[str, Any]:
    """Everything that `doctor` prints, for JSON. Contains no user name: paths are shown from the home folder on."""
    from fieldmark.budget.candidates import find_backbones
    from fieldmark.config import Config
    from fieldmark.errors import FieldmarkError
    from fieldmark.files import user_folder
    from fieldmark.runs.environment import describe_environment

    environment = describe_environment()
    versions = environment["versions"]
    try:
        weights = [f"{found.name} ({found.weights})" for found in find_backbones(Config())]
    except FieldmarkError:
        weights = []
    folders = {"cache": user_folder("cache").parent, "runs": Path.cwd() / "runs"}
    return {
        "fieldmark": versions.pop("fieldmark"),
        "python": versions.pop("python"),
        "machine": environment["hardware"],
        "versions": versions,
        "weights": weights,
        "extras": find_extras(),
        "folders": [measure_folder(name, path) for name, path in folders.items()],
        "hub_answers": hub_answers(),
    }


def find_extras() -> dict[str, list[str]]:
    """Extra to the packages of it that are not installed; an empty list is a complete extra."""
    from fieldmark.runs.environment import package_versions

    missing: dict[str, list[str]] = {}
    for line in metadata.requires("fieldmark") or ():
        found = re.match(r"""([A-Za-z0-9._-]+).*;.*extra == ['"]([^'"]+)['"]""", line)
        if found and found[2] not in NOT_FOR_USERS:
            absent = missing.setdefault(found[2], [])
            if found[1] != "fieldmark" and not package_versions([found[1]]):
                absent.append(found[1])
    return missing


def measure_folder(name: str, path: Path) -> dict[str, Any]:
    """Size of a folder and free space of its disk, in gigabytes."""
    free = shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free
    used = sum(Path(folder, file).lstat().st_size for folder, _, files in os.walk(path) for file in files)
    shown = str(path).replace(str(Path.home()), "~", 1)
    return {"name": name, "path": shown, "gigabytes": round(used / 1e9, 2), "free_gigabytes": round(free / 1e9, 1)}


def hub_answers() -> bool:
    """Whether the model hub, or the mirror that HF_ENDPOINT names, can be reached, by the proxy if there is one."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # the client raises its HTTP library's errors, and that library changes
        return False
    return True  # who refuses is there, too
