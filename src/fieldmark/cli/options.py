"""Options that several verbs share, how they are completed in a shell, and how verbs print."""

from __future__ import annotations

import gc
import json
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from fieldmark.config import Config

DEFAULT_RECIPE = "strong"
PREPARE, TRAIN, USE, COMPARE = "Prepare", "Train", "Use a model", "Compare and improve"


class GroupedHelp(TyperGroup):
    """The list of verbs in groups, in the order in which a newcomer needs them; hidden verbs by name alone."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each panel. Typer itself would need rich, which slows every call."""
        commands: dict[str, Any] = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        for title in (PREPARE, TRAIN, USE, COMPARE):
            with formatter.section(title):
                shown = {name: verb for name, verb in commands.items() if verb.rich_help_panel == title}
                formatter.write_dl([(name, verb.get_short_help_str(80)) for name, verb in shown.items()])
        with formatter.section("More"):
            hidden = ", ".join(name for name, verb in commands.items() if verb.hidden)
            formatter.write_text(f"{hidden}: fieldmark VERB -h")


class BareRay(TyperCommand):
    """A verb whose `--ray`, last or before another option, starts a cluster on this machine."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read `--ray` without an address as `--ray=`."""
        following = [*args, "-"][1:]
        bare = [word == "--ray" and after.startswith("-") for word, after in zip(args, following, strict=True)]
        words = ["--ray=" if is_bare else word for word, is_bare in zip(args, bare, strict=True)]
        return super().parse_args(ctx, words)


@contextmanager
def quick_imports() -> Generator[None]:
    """Import without searches for garbage: among half a million objects that stay they take a fifth of the time.

    Nor do later searches look at those objects.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes, and TOML files here."""
    from fieldmark.config import recipe_names

    return _starting(incomplete, [*recipe_names(), *map(str, Path().glob("*.toml"))])


def complete_setting(incomplete: str) -> list[str]:
    """Keys of settings; after the `=`, the words that a setting takes."""
    from fieldmark.config import Config
    from fieldmark.overrides import list_settings, setting_words

    key, equals, _ = incomplete.partition("=")
    if equals:
        return _starting(incomplete, [f"{key}={word}" for word in setting_words(Config, key)])
    return _starting(incomplete, [f"{name}=" for name in list_settings(Config)])


def complete_run(incomplete: str) -> list[str]:
    """Run folders below the folder that is being typed, or below runs/ and sweeps/."""
    parent = Path(incomplete[: incomplete.rindex("/") + 1]) if "/" in incomplete else None
    roots = [parent] if parent else [Path(), Path("runs"), Path("sweeps")]
    found = [path for root in roots if root.is_dir() for path in root.iterdir() if path.is_dir()]
    runs = [str(path) for path in found if (path / "recipe.toml").is_file()]
    return _starting(incomplete, runs or [f"{path}/" for path in found])


def _starting(incomplete: str, words: Iterable[str]) -> list[str]:
    return sorted(word for word in words if word.startswith(incomplete))


Data = Annotated[str, typer.Argument(help="Folder of class folders, a table or shards; path or URL.")]
Recipe = Annotated[str, typer.Option("--recipe", help="Shipped recipe or TOML file.", autocompletion=complete_recipe)]
RecipeName = Annotated[str, typer.Argument(help="Shipped recipe or TOML file.", autocompletion=complete_recipe)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; repeatable.", autocompletion=complete_setting),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
RunFolder = Annotated[Path, typer.Argument(help="Run folder of `fieldmark train`.", autocompletion=complete_run)]
Model = Annotated[Path, typer.Argument(help="Run folder, or an exported model.", autocompletion=complete_run)]
RunFolders = Annotated[list[Path], typer.Argument(help="Run folders or sweeps of them.", autocompletion=complete_run)]
NewRun = Annotated[Path | None, typer.Option("--out", help="Run folder to make; default: a new one in runs/.")]
Ray = Annotated[str | None, typer.Option("--ray", help="Share the work on a Ray cluster; alone, start one here.")]


def flag_overrides(recipe: str | None, *, track: list[str] | None, **flags: float | str | None) -> list[str]:
    """Short options as `key=value` pairs; where the recipe fixes the size of evaluation, `size` changes that too."""
    pairs = [f"{key}={value}" for key, value in flags.items() if value is not None]
    if flags.get("size") is not None and recipe is not None:
        from fieldmark.config import read_recipe

        if "size" in read_recipe(recipe)[1].get("eval", {}):
            pairs.append(f"eval.size={flags['size']}")
    return [*pairs, f"train.trackers={','.join(track)}"] if track else pairs


def read_settings(recipe: str | None, data: str | None, overrides: list[str] | None) -> Config:
    """Read a recipe with overrides, for photos that the command line names."""
    from fieldmark.config import load_config

    return load_config(recipe, overrides or (), data=data)


def print_result(content: Any, text: str, *, as_json: bool) -> None:
    """Print a result to stdout: as JSON for machines, or as text for people."""
    typer.echo(json.dumps(content, indent=2) if as_json else text)
