"""The verbs that put a trained model to use: from evaluate and predict to suggest, review and app."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from fieldmark.cli.options import Json, Model, Overrides, Ray, RunFolder, RunFolders, print_result, quick_imports
from fieldmark.progress import open_progress


def evaluate(
    run: RunFolder,
    split: Annotated[str, typer.Option(help="val, test or train.")] = "val",
    data: Annotated[str | None, typer.Option(help="Where the photos are now, if they moved.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for tables and pictures.")] = None,
    flips: Annotated[bool, typer.Option("--flips", help="As predict --flips would, and what that changes.")] = False,
    as_json: Json = False,
) -> None:
    """Evaluate a run on a labeled split.

    Accuracy with its interval, each class, confusion, calibration. Tables and pictures go to RUN/evaluation.
    """
    from fieldmark.inference.evaluation import evaluate_run, make_output_folder, save_evaluation

    if out is not None:
        make_output_folder(out)
    with open_progress("evaluate") as progress:
        found = evaluate_run(run, split=split, data=data, flips=flips, progress=progress)
    paths = save_evaluation(found, out or run / "evaluation" / (f"{split}-flips" if flips else split))
    print_result(found.as_dict(), str(found), as_json=as_json)
    typer.echo("wrote " + ", ".join(map(str, paths)), err=True)


def predict(
    model: Model,
    photos: Annotated[str, typer.Argument(help="Folder of photos, one photo, a list or shards; path or URL.")],
    out: Annotated[Path | None, typer.Option(help="File to write: .csv, .zip, .json or .parquet.")] = None,
    form: Annotated[
        Literal["short", "long", "leaderboard"] | None,
        typer.Option(
            help="short: label and top 3; long: all probabilities; leaderboard: image_name,pred_label. "
            "Default: short; leaderboard with --sample or for .zip.",
        ),
    ] = None,
    sample: Annotated[Path | None, typer.Option(help="Sample submission to hold the rows against.")] = None,
    sample_order: Annotated[bool, typer.Option("--sample-order", help="Write the rows in the sample's order.")] = False,
    flips: Annotated[bool, typer.Option("--flips", help="Average over each photo and its mirror image.")] = False,
    path_column: Annotated[str, typer.Option(help="Column of a list that holds the paths.")] = "path",
    prior: Annotated[
        Literal["training", "estimate", "uniform"],
        typer.Option(help="Class shares to correct for: those estimated here, or uniform ones to lift small classes."),
    ] = "training",
    ray: Ray = None,
    as_json: Json = False,
) -> None:
    """Name photos and write a prediction file.

    Every photo has exactly one row. One that cannot be read has an empty label, is named on stderr, and makes the exit
    code 2. With --ray the work is shared out in parts, and a second call computes only what is missing.
    """
    with quick_imports():
        from fieldmark.inference.predict import predict_photos

    with open_progress("predict") as progress:
        done = predict_photos(model, photos, out, form=form, sample=sample, sample_order=sample_order, flips=flips,
                              progress=progress, ray=ray, path_column=path_column, prior=prior)  # fmt: skip
    print_result(done.content(), done.table(), as_json=as_json)
    if done.prior:
        typer.echo(done.prior_message(), err=True)
    if done.failed:
        typer.echo(done.failure_message(), err=True)
        raise typer.Exit(2)


def combine(
    runs: RunFolders,
    out: Annotated[Path, typer.Option(help="Folder to make; it predicts alone.")],
    method: Annotated[
        Literal["ensemble", "soup"], typer.Option(help="Average the answers; or the weights, into one model.")
    ] = "ensemble",
    max_parameters_millions: Annotated[
        float | None, typer.Option(help="Budget for all parameters; default: the smallest in the runs' recipes.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make one predictor of several runs.

    predict, evaluate, calibrate and serve take it as they take a run. The runs must share their validation photos.
    """
    from fieldmark.inference.combine import combine as combine_runs
    from fieldmark.inference.combine import format_combined

    with open_progress("combine") as progress:
        run = combine_runs(runs, out, method=method, max_parameters_millions=max_parameters_millions, progress=progress)
    print_result({"run": str(run.path), **run.summary}, format_combined(run), as_json=as_json)


def calibrate(
    run: RunFolder,
    accuracy: Annotated[float | None, typer.Option(help="Wanted accuracy of the answers, such as 0.95.")] = None,
    coverage: Annotated[float | None, typer.Option(help="Wanted share of photos that are answered.")] = None,
    confidence_level: Annotated[
        float, typer.Option(help="How sure the accuracy must be, below 1; 0 takes it as seen.")
    ] = 0.0,
    taxonomy: Annotated[
        Path | None, typer.Option(help="Table of class,genus,family: answer with the group that is sure.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make probabilities honest, and choose when to say "unknown".

    Fits a temperature on the validation photos, evaluated on photos that it was not fitted on. predict, serve and
    export use it from then on. With a class _none, 95 % of the other photos are answered unless you want otherwise.
    """
    from fieldmark.data.folders import NONE
    from fieldmark.inference.calibration import calibrate_run, describe_calibration, save_calibration_figure
    from fieldmark.inference.taxonomy import describe_fallback, taxonomy_scores
    from fieldmark.runs.folder import Run

    if accuracy is not None and coverage is not None:
        raise typer.BadParameter("give --accuracy or --coverage, not both")
    wanted = "accuracy" if accuracy is not None else "coverage" if coverage is not None else "none"
    value = next((share for share in (accuracy, coverage) if share is not None), 1.0)
    opened = Run(run)
    if wanted == "none" and NONE in opened.classes:
        wanted, value = "coverage", 0.95
    found = calibrate_run(
        opened, wanted=wanted, wanted_value=value, confidence_level=confidence_level, folds=5, seed=0, taxonomy=taxonomy
    )
    levels = taxonomy_scores(opened, taxonomy) if taxonomy else {}
    shown = [f"right at the level of {level}: {share:.1%}" for level, share in levels.items()]
    parts = [describe_calibration(found), "\n".join(shown), describe_fallback(found.back_off) if found.back_off else ""]
    content = asdict(found) | ({"levels": levels} if levels else {})
    print_result(content, "\n\n".join(filter(None, parts)), as_json=as_json)
    typer.echo(f"wrote {save_calibration_figure(opened, found)}", err=True)


def export(
    run: RunFolder,
    to: Annotated[Literal["onnx", "openvino", "torch", "timm", "web"], typer.Option(help="Its form.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="Folder to create; RUN-FORM if not given.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantize (onnx, openvino, web): smaller.")] = False,
    max_accuracy_loss: Annotated[float, typer.Option(help="Most accuracy that int8 may lose; 0.01 is a point.")] = 0.01,
    photos: Annotated[int, typer.Option(help="Most validation photos to prove it on.", min=1)] = 600,
    push: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Also upload it to the model hub; a new one is private.")
    ] = None,
) -> None:
    """Write the model for elsewhere, proven to give the same answers."""
    from fieldmark.export.export import evidence_text, export_run, push_export
    from fieldmark.runs.folder import Run

    folder = out or run.with_name(f"{run.resolve().name}-{to}{'-int8' if int8 else ''}")
    written = export_run(Run(run), folder, to=to, is_int8=int8, max_accuracy_loss=max_accuracy_loss, max_photos=photos)
    typer.echo(f"wrote {folder}\n{evidence_text(written.evidence)}")
    if push is not None:
        typer.echo(f"uploaded to {push_export(folder, push)}")


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="FIELDMARK_API_KEY", help="Ask clients for this key (X-API-Key).")
    ] = None,
    hostname: Annotated[list[str] | None, typer.Option(help="Name that it is served under; may be repeated.")] = None,
    cors: Annotated[
        list[str] | None, typer.Option(help="Other site whose pages may ask, such as https://birds.example.")
    ] = None,
    max_megabytes: Annotated[float, typer.Option(help="Largest request.", min=0.001)] = 64.0,
    max_megapixels: Annotated[float, typer.Option(help="Largest photo.", min=0.001)] = 60.0,
    max_photos: Annotated[int, typer.Option(help="Most photos in a request.", min=1)] = 64,
    queue: Annotated[int, typer.Option(help="Most photos at a time; beyond it, requests are refused.", min=1)] = 256,
    batch: Annotated[int, typer.Option(help="Most photos in one pass of the model.", min=1)] = 16,
    timeout: Annotated[float, typer.Option(help="Longest time for a request, in seconds.", min=0.1)] = 30.0,
) -> None:
    """Answer photos over HTTP, with a web page at the address itself."""
    from fieldmark.runs.environment import usable_cores
    from fieldmark.serve.limits import Access, Limits
    from fieldmark.serve.server import is_local, open_app, run_server

    limits = Limits(
        max_body_bytes=int(max_megabytes * 2**20),
        max_held_bytes=8 * int(max_megabytes * 2**20),
        max_photos=max_photos,
        max_pixels=int(max_megapixels * 1e6),
        max_queued=queue,
        body_seconds=timeout,
        answer_seconds=timeout,
        max_batch=batch,
    )
    api_key = os.environ.get("FIELDMARK_API_KEY") if api_key is None else api_key  # an empty one is an error too
    access = Access((host, *(hostname or ())), api_key, tuple(cors or ()))
    app = open_app(model.absolute(), usable_cores(), limits=limits, access=access)
    if not is_local(host) and not api_key:
        typer.echo(f"warning: {host} can be reached from other machines, and no --api-key is set", err=True)
    typer.echo(f"serving {model} at http://{host}:{port} (stop with Ctrl-C)", err=True)
    run_server(app, host=host, port=port, drain_seconds=int(timeout) + 1, max_connections=1000)


def suggest(
    run: RunFolder,
    pool: Annotated[str, typer.Argument(help="Photos without labels, as for predict: a folder, a list or shards.")],
    count: Annotated[int, typer.Option(help="How many photos to choose.", min=1)] = 100,
    out: Annotated[Path, typer.Option(help="List to write: path,label,probability,why.")] = Path("suggestions.csv"),
    as_json: Json = False,
) -> None:
    """Choose which photos to label next.

    Those that teach the model most: it is unsure of them, they stand for many others, and no two look the same. Label
    them in the page of `fieldmark review RUN LIST`, then teach the model by `fieldmark extend`.
    """
    from fieldmark.errors import command
    from fieldmark.inference.triage import suggest as suggest_photos

    with open_progress("suggest") as progress:
        rows = suggest_photos(run, pool, out, count=count, progress=progress)
    lines = [f"wrote {len(rows)} photos to {out}, the most useful first:"]
    lines += [f"  {row['path']}: {row['why']}" for row in rows[:3]]
    lines.append(f"label them: {command('review', run, out)}")
    print_result({"out": str(out), "photos": rows}, "\n".join(lines), as_json=as_json)


def review(
    runs: Annotated[list[Path], typer.Argument(help="Run folder; one per fold; or a run and a list to label.")],
    out: Annotated[Path | None, typer.Option(help="Table; corrections.csv beside the run, or LIST-labels.csv.")] = None,
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8001,
    near: Annotated[int, typer.Option(help="Near-duplicates differ in at most so many of 64 bits.", min=0, max=11)] = 6,
    to_file: Annotated[Path | None, typer.Option("--export", help="Only write guesses and decisions as JSON.")] = None,
    form: Annotated[Literal["label-studio", "fiftyone"], typer.Option(help="Of --export.")] = "label-studio",
    from_file: Annotated[Path | None, typer.Option("--import", help="Only take decisions from such a file.")] = None,
) -> None:
    """Fix labels, or give new ones, in a local web page.

    The photos are only read. Train with the corrections by --set data.corrections=TABLE. With a list of photos after
    the run, such as `suggest` writes, they are labeled, in a table that `fieldmark extend` takes.
    """
    from fieldmark.data.tables import TABLE_SUFFIXES
    from fieldmark.runs.folder import Run
    from fieldmark.serve.exchange import export_decisions, import_decisions
    from fieldmark.serve.review import open_labeling, open_review
    from fieldmark.serve.server import run_server

    first, *others = runs
    is_labeling = len(others) == 1 and others[0].suffix.lower() in TABLE_SUFFIXES
    beside, name = (others[0], f"{others[0].stem}-labels.csv") if is_labeling else (first.resolve(), "corrections.csv")
    table = out or beside.with_name(name)
    if to_file or from_file:
        if is_labeling or (to_file and from_file):
            raise typer.BadParameter("give --export or --import, with run folders alone")
        if to_file:
            written = export_decisions([Run(run) for run in runs], table, to_file, form=form)
            typer.echo(f"wrote {', '.join(map(str, written))}")
        elif from_file:
            count = import_decisions([Run(run) for run in runs], table, from_file)
            typer.echo(f"took {count} decisions from {from_file} into {table}")
        return
    if is_labeling:
        app = open_labeling(Run(first), others[0], table)
    else:
        app = open_review([Run(run) for run in runs], table, max_distance=near)
    typer.echo(f"review at http://127.0.0.1:{port}, decisions go to {table} (stop with Ctrl-C)", err=True)
    run_server(app, host="127.0.0.1", port=port, drain_seconds=5, max_connections=200)


def app(
    root: Annotated[Path | None, typer.Option(help="Folder with the photos; default: the home folder.")] = None,
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8002,
    set_: Overrides = None,
) -> None:
    """Do all of it in a local web page.

    Choose photos, look at them, train, try the model, mend labels, export. Trainings go on without the page: they are
    run folders in ROOT/fieldmark-runs, where it finds them again. Nothing outside ROOT is read or written.
    """
    from fieldmark.serve.server import run_server
    from fieldmark.serve.studio import create_studio_app

    root = root or Path.home()
    pages = create_studio_app(root, set_ or ())
    typer.echo(
        f"open http://127.0.0.1:{port} in a browser; photos are looked for in {root} (stop with Ctrl-C)", err=True
    )
    run_server(pages, host="127.0.0.1", port=port, drain_seconds=5, max_connections=200)
