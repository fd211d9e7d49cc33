"""Decisions about labels for and from other tools, as plain JSON: Label Studio's tasks, FiftyOne's labels.

Source:
    labelstud.io/guide/task_format; FiftyOneImageClassificationDataset of docs.voxel51.com, which names a photo by its
    path without extension.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Required
from urllib.parse import quote, unquote

from pydantic import InstanceOf
from typing_extensions import TypedDict

from fieldmark.data.index import PhotoIndex, check_decisions
from fieldmark.errors import DataError
from fieldmark.files import fill_template, read_values, require_path, write_whole
from fieldmark.inference.triage import join_held_out
from fieldmark.runs.folder import Run, write_json
from fieldmark.serve.review import Corrections, Decision

Form = Literal["label-studio", "fiftyone"]
Row = tuple[str, str, str, str]  # where it stands, path, action, label


class _Annotation(TypedDict, total=False):
    result: Required[list[dict[str, Any]]]
    was_cancelled: bool


class _Task(TypedDict, total=False):
    data: Required[dict[str, Any]]
    annotations: list[_Annotation]


class _Labels(TypedDict):
    classes: list[InstanceOf[str]]
    labels: dict[InstanceOf[str], int | str | dict[str, Any] | None]


def export_decisions(runs: Sequence[Run], table: Path, path: Path, *, form: Form) -> list[Path]:
    """Write the photos of a review with guesses and decisions; the files written.

    Beside Label Studio's tasks comes the labeling interface that fits them, beside FiftyOne's labels the guesses.
    """
    index, held_out, decisions = runs[0].split, join_held_out(runs), Corrections(table).decisions
    labels = {photo.path: photo.label or "" for photo in index.photos}
    best = zip(held_out.guesses.tolist(), held_out.probabilities.max(axis=1).tolist(), strict=True)
    guesses = dict(zip(held_out.paths, best, strict=True))
    shown = [name for name in labels if name in guesses or name in decisions]
    beside = path.with_suffix(".xml" if form == "label-studio" else ".predictions.json")
    if form == "label-studio":
        tasks = [_make_task(name, labels[name], index, guesses.get(name), decisions.get(name)) for name in shown]
        write_json(path, tasks)
        write_whole(beside, fill_template("label_studio.html", {"classes": index.classes}) + "\n")
        return [path, beside]
    kept = {
        name: None if one.action == "drop" else one.label or labels.get(name, "") for name, one in decisions.items()
    }
    number_of: dict[str | None, int | None] = {name: number for number, name in enumerate(index.classes)} | {None: None}
    _require_one_photo_a_name(index, map(_without_extension, shown))
    targets = {_without_extension(name): number_of[kept.get(name, labels[name])] for name in shown}
    found = {_without_extension(name): {"label": one, "confidence": share} for name, (one, share) in guesses.items()}
    for file, content in ((path, targets), (beside, found)):
        write_json(file, {"classes": index.classes, "labels": content})
    return [path, beside]


def _make_task(
    path: str, label: str, index: PhotoIndex, guess: tuple[int, float] | None, decision: Decision | None
) -> dict[str, Any]:
    def choose(word: str, name: str = "choice") -> list[dict[str, Any]]:
        return [{"from_name": name, "to_name": "image", "type": "choices", "value": {"choices": [word]}}]

    image = "/data/local-files/?d=" + quote(path, errors="surrogateescape")
    task: dict[str, Any] = {"data": {"image": image, "path": path, "label": label}}
    if guess:
        result = choose(index.classes[guess[0]])
        task["predictions"] = [{"model_version": "fieldmark", "score": guess[1], "result": result}]
    if decision:
        is_dropped = decision.action == "drop"
        task["annotations"] = [{"result": choose("drop", "action") if is_dropped else choose(decision.label or label)}]
    return task


def import_decisions(runs: Sequence[Run], table: Path, path: Path) -> int:
    """Take the decisions of either tool's file into the table, all or none; their number.

    Raises:
        DataError: The file has another form, or photos or classes are not those of the review.
    """
    index, before = runs[0].split, Corrections(table).decisions
    try:
        content: Any = json.loads(require_path(path).read_text(encoding="utf-8"))
        if isinstance(content, list):
            rows = list(_read_tasks(path, read_values(list[_Task], content)))
        else:
            rows = list(_read_labels(path, read_values(_Labels, content), index, before))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:160]
        expected = "give the JSON export of Label Studio (not JSON-MIN), or the labels.json of FiftyOne"
        raise DataError(f"{path} is in another form ({reason}): {expected}") from None
    own = {photo.path: photo.label for photo in index.photos}
    # To give a photo the label that an earlier decision gave it is to keep that decision.
    rows = [row for row in rows if own.get(row[1]) != row[3] or before.get(row[1]) != Decision("relabel", row[3])]
    found = check_decisions(index, ((*row[:2], "keep", "") if own.get(row[1]) == row[3] else row for row in rows))
    Corrections(table).take({name: Decision(*decision) for name, decision in found.items()})
    return len(found)


def _read_tasks(path: Path, tasks: list[_Task]) -> Iterator[Row]:
    for number, task in enumerate(tasks, start=1):
        where, data = f"{path}, task {number}", task["data"]
        name = data.get("path") or unquote(data["image"].rpartition("?d=")[2], errors="surrogateescape")
        for annotation in task.get("annotations", ()):
            results = [one for one in annotation["result"] if "choices" in one["value"]]
            words = [(one["from_name"] == "action", word) for one in results for word in one["value"]["choices"]]
            if annotation.get("was_cancelled") or not words:
                continue  # skipped by whoever saw it
            if len(words) > 1:
                raise DataError(f"{where}: {name!r} has the choices {[word for _, word in words]}. Leave one")
            [(is_action, word)] = words
            yield where, name, word if is_action else "relabel", "" if is_action else word


def _read_labels(path: Path, content: _Labels, index: PhotoIndex, before: Mapping[str, Decision]) -> Iterator[Row]:
    _require_one_photo_a_name(index, content["labels"])
    photos = {_without_extension(photo.path): photo for photo in index.photos}
    for name, target in content["labels"].items():
        photo, given = photos.get(name), target["label"] if isinstance(target, dict) else target
        label = content["classes"][given] if isinstance(given, int) else given
        if photo is None or label != photo.label or photo.path in before:
            action = "drop" if label is None else "relabel"
            yield f"{path}, {name!r}", photo.path if photo else name, action, label or ""


def _require_one_photo_a_name(index: PhotoIndex, names: Iterable[str]) -> None:
    photos = Counter(_without_extension(photo.path) for photo in index.photos)
    if double := next((name for name in names if photos[name] > 1), None):
        raise DataError(
            f"FiftyOne names photos without extension, and {photos[double]} photos are named {double!r}. Use the form "
            "label-studio"
        )


def _without_extension(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))
