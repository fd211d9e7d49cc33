"""The command line: each verb parses, calls and prints. Only this folder prints.

Results go to stdout (`--json` for machines), progress and errors to stderr. Exit codes: 0 done, 1 a bug (with its
traceback) or nobody reading the results any more, 2 the user can fix it (one message), 130 stopped by a signal.
"""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from fieldmark.cli import prepare, train, use
from fieldmark.cli.options import COMPARE, PREPARE, TRAIN, USE, BareRay, GroupedHelp
from fieldmark.errors import FieldmarkError, InterruptedRunError, ReportedElsewhereError

app = typer.Typer(
    name="fieldmark",
    cls=GroupedHelp,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# What a machine refuses, and a user can fix. Any other OSError is a bug and shows its traceback.
MACHINE_ERRORS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Make it readable and writable, or choose another place"),
    errno.EIO: "Check the disk",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EMFILE: "Allow more open files (ulimit -n)",
}


def print_version(is_asked: bool) -> None:
    """Print the version and stop."""
    if is_asked:
        import fieldmark

        typer.echo(f"fieldmark {fieldmark.__version__}")
        raise typer.Exit


@app.callback()
def fieldmark_options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train an image classifier from a folder of photos, and know which choices made it better."""


VERBS: dict[str, tuple[Callable[..., None], ...]] = {
    PREPARE: (prepare.check, prepare.pack, prepare.models, prepare.doctor),
    TRAIN: (train.demo, use.app, train.train, train.extend, train.sweep),
    USE: (use.evaluate, use.predict, use.calibrate, use.combine, use.export, use.serve),
    COMPARE: (use.suggest, use.review, train.compare, train.report),
}
for panel, verbs in VERBS.items():
    for verb in verbs:
        app.command(cls=BareRay, rich_help_panel=panel)(verb)
for verb in (prepare.preview, prepare.split, prepare.cache):  # what `check` and `train` do themselves
    app.command(hidden=True)(verb)
config = typer.Typer(help="Show settings and recipes.", no_args_is_help=True, rich_markup_mode=None)
config.command("show")(prepare.config_show)
config.command("recipes")(prepare.recipes_list)
app.add_typer(config, name="config", rich_help_panel=PREPARE)
recipes = typer.Typer(help="Shipped recipes.", no_args_is_help=True, rich_markup_mode=None)
recipes.command("list")(prepare.recipes_list)
app.add_typer(recipes, name="recipes", hidden=True)


def main() -> None:
    """Run the command line; the one place where our errors become a message and an exit code."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook names a backend that only its own environment has
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be valid text
    # Whenever it comes, it is told, and what was begun is taken away.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except FieldmarkError as error:
        sys.exit(_report(error))
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        typer.echo(f"error: {where}{error.strerror}. {MACHINE_ERRORS[error.errno]}", err=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:  # typer's answer to both
            typer.echo("stopped by Ctrl-C or SIGTERM", err=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(error: FieldmarkError) -> int:
    """Print an error that no other process of the same training prints; give the exit code."""
    is_stopped = isinstance(error, InterruptedRunError)
    is_told = isinstance(error, ReportedElsewhereError) and error.rank is not None
    if is_stopped or isinstance(error, ReportedElsewhereError):
        from fieldmark.runs.environment import is_main_process

        is_told = is_told or not is_main_process()
    if not is_told:
        typer.echo(str(error) if is_stopped else f"error: {error}", err=True)
    return 130 if is_stopped else 2
