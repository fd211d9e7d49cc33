"""The review page: where the model errs, or what to label next, and a table of decisions. Photos are only read."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from fieldmark.data.columns import Photos
from fieldmark.data.decode import DecodeSpec
from fieldmark.data.folders import Photo
from fieldmark.data.index import PhotoIndex
from fieldmark.data.shards import PhotoFile
from fieldmark.data.tables import read_table, write_csv
from fieldmark.errors import DataError, FieldmarkError, PhotoError, command
from fieldmark.files import exclusive_lock, require_path
from fieldmark.inference import triage
from fieldmark.inference.triage import AttentionMaps, HeldOut
from fieldmark.plots import thumbnail
from fieldmark.runs.folder import Run
from fieldmark.serve.limits import Access, Limits
from fieldmark.serve.server import finish_app
from fieldmark.serve.service import ServerMetrics, prepare_photo

_THUMBNAILS_KEPT = 4000  # about 15 KB each
# A request here is a decision of some hundred bytes.
_LIMITS = Limits(max_body_bytes=2**16, max_held_bytes=2**20, body_seconds=10.0, answer_seconds=60.0)
ACTIONS = ("keep", "relabel", "drop")
CORRECTIONS, LABELS = ("path", "action", "label"), ("path", "label")
"""Columns of the two tables: of decisions about labels that are there, and of labels, as training takes them."""


class Decision(NamedTuple):
    """Holds what to do with one photo; `label` is the new one of a relabeled photo, else ""."""

    action: str
    label: str


class Corrections:
    """Decisions by path, written to disk after each change. Calls from several threads are safe.

    `columns` are CORRECTIONS or LABELS; in a table of labels every photo is one that was relabeled.
    """

    def __init__(self, file: Path, columns: tuple[str, ...] = CORRECTIONS) -> None:
        if file.suffix.lower() != ".csv":
            raise DataError(f"decisions are written as CSV, and {file} does not end in .csv: give another --out")
        self.file, self.columns, self._lock = file, columns, threading.Lock()
        self.decisions = self._read() if file.is_file() else {}  # by path, the oldest first
        # Each change with what was there before; decisions of earlier sessions can be undone too, newest first.
        self._history: list[tuple[str, Decision | None]] = [(path, None) for path in self.decisions]

    def decide(self, path: str, action: str, label: str) -> None:
        """Decide about a photo; an earlier decision is replaced."""
        self.take({path: Decision(action, label if action == "relabel" else "")})

    def take(self, decisions: Mapping[str, Decision]) -> None:
        """Decide about several photos at once."""
        with self._lock:
            self._write(decisions)

    def undo(self) -> str | None:
        """Take back the latest change; its path, or None if there is none."""
        with self._lock:
            if not self._history:
                return None
            path, before = self._history[-1]
            self._write({path: before})
            del self._history[-2:]  # the change, and that it was taken back
            return path

    def _write(self, changes: Mapping[str, Decision | None]) -> None:
        """Write the table as it is by now with other decisions about some photos, and only then take them."""
        lock = self.file.with_name(f".{self.file.name}.lock")
        with exclusive_lock(lock, busy=f"another program writes {self.file}: decide again", wait_seconds=10):
            known = self._read() if self.file.is_file() else {}
            decisions = {key: value for key, value in known.items() if key not in changes}
            decisions |= {key: value for key, value in changes.items() if value}
            rows = [{"path": key, **value._asdict()} for key, value in decisions.items()]
            write_csv(self.file, self.columns, [[row[name] for name in self.columns] for row in rows])
        self._history += [(path, known.get(path)) for path in changes]
        self.decisions = decisions

    def _read(self) -> dict[str, Decision]:
        table = read_table(self.file)
        actions = table.values.get("action", ["relabel"] * table.num_rows)
        if set(self.columns) != set(table.values) or not set(ACTIONS) >= set(actions):
            what = f"a table of {'labels' if self.columns == LABELS else 'corrections'} ({','.join(self.columns)})"
            raise DataError(f"{self.file} is not {what}: give another --out")
        rows = zip(table.column("path", is_text=False), actions, table.column("label"), strict=True)
        return {path: Decision(action, label) for path, action, label in rows}


DuplicateSearch = Callable[[], Sequence[tuple[int, int, int]]]  # photo number, photo number, bits that differ
Look = Callable[[int, int], dict[str, Any]]  # photo number, class number -> the attention map and its box


class DecisionRequest(BaseModel):
    """A decision about one photo."""

    number: int
    action: Literal["keep", "relabel", "drop"]
    label: str = ""


@dataclass(eq=False)
class ReviewViews:
    """Orders the photos of a run by why they deserve a look; near-duplicates are searched on a thread of their own.

    With `suggested`, the photos of the index have no labels yet: it says of each the model's `guess` and `why` to label
    it, and `model` is the run that is to learn them.
    """

    index: PhotoIndex
    held_out: HeldOut
    corrections: Corrections
    _: KW_ONLY
    find_duplicates: DuplicateSearch
    look: Look | None
    decoding: DecodeSpec
    suggested: Sequence[dict[str, Any]] = ()
    model: Path | None = None
    source: str = ""  # what the run was told to train on; "" is the root of the index

    def __post_init__(self) -> None:
        self.files = self.index.files()
        self.classes = self.held_out.classes
        self.thumbnail = lru_cache(maxsize=_THUMBNAILS_KEPT)(thumbnail)
        self.number_of = {photo.path: number for number, photo in enumerate(self.index.photos)}
        self._row_of = {path: row for row, path in enumerate(self.held_out.paths)}
        self._guesses, self._losses = self.held_out.guesses, self.held_out.losses
        self.pairs = triage.confused_pairs(self.held_out)
        self._suspects = self._numbers(triage.label_suspects(self.held_out))
        self._highest = self._numbers(np.argsort(-self._losses, kind="stable"))
        self._duplicates: list[tuple[int, int, int]] = []
        self._duplicates_state = "searching"
        self._by_class: dict[str | None, list[int]] = defaultdict(list)
        for number, photo in enumerate(self.index.photos):
            self._by_class[photo.label].append(number)
        self._search = threading.Thread(target=self._find, daemon=True)
        self._search.start()

    def overview(self) -> dict[str, Any]:
        """Names and sizes of the views."""
        table = self.corrections.file
        retrain = command("train", self.source or self.index.root, "--set", f"data.corrections={table}")
        new = {decision.label for decision in self.corrections.decisions.values() if decision.label}
        names = [*self.classes, *sorted(new - set(self.classes))]
        return {
            "classes": [{"name": name, "photos": len(self._by_class[name])} for name in names],
            "photos": len(self.index.photos),
            "held_out": len(self.held_out.paths),
            "suggested": len(self.suggested),
            "suspects": len(self._suspects),
            "losses": len(self._highest),
            "pairs": [
                {"first": self.classes[first], "second": self.classes[second], "photos": len(rows)}
                for first, second, rows in self.pairs[:200]
            ],
            "duplicates": len(self._duplicates),
            "duplicates_state": self._duplicates_state,
            "marked": len(self.corrections.decisions),
            "table": table.name,
            "command": _printable(command("extend", self.model, table) if self.model else retrain),
            "has_attention": self.look is not None,
        }

    def page(
        self,
        view: str,
        which: int = 0,
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=200)] = 60,
    ) -> dict[str, Any]:
        """Photos of one view from row `offset` on; `which` is the number of a pair or of a class."""
        rows = self._duplicates if view == "duplicates" else self._view(view, which)
        photos: list[dict[str, Any]] = []
        for position, row in enumerate(rows[offset : offset + limit], start=offset):
            if isinstance(row, int):
                photos.append(self.photo(row))
            else:
                left, right, bits = row
                photos += [{**self.photo(number), "near": position, "bits": bits} for number in (left, right)]
        return {"total": len(rows), "next": min(max(offset, len(rows)), offset + limit), "photos": photos}

    def photo(self, number: int) -> dict[str, Any]:
        """Return what the page says of one photo."""
        photo = self.index.photos[number]
        decision = self.corrections.decisions.get(photo.path)
        row = self._row_of.get(photo.path)
        known: dict[str, Any] = {"guess": None, "probability": None, "loss": None}
        if self.suggested:
            known |= self.suggested[number]
        elif row is not None:
            guess = int(self._guesses[row])
            probability = float(self.held_out.probabilities[row, guess])
            known = {"guess": self.classes[guess], "probability": probability, "loss": float(self._losses[row])}
        return {
            "number": number,
            "path": _printable(photo.path),
            "label": photo.label,
            "split": photo.split,
            **known,
            "action": decision.action if decision else None,
            "new_label": decision.label if decision else None,
        }

    def decide(self, request: DecisionRequest) -> dict[str, Any]:
        """Take a decision; the photo afterwards."""
        self._require_photo(request.number)
        label = request.label
        if self.suggested:
            if request.action != "relabel" or not label.strip() or not label.isprintable():
                raise HTTPException(422, "a photo of this list takes the name of a class, and nothing else")
        elif request.action == "relabel" and label not in self.classes:
            raise HTTPException(422, f"{label!r} is not one of the {len(self.classes)} classes")
        photo = self.index.photos[request.number]
        before = self.corrections.decisions.get(photo.path)
        # To keep the label that an earlier decision gave is to keep that decision.
        if request.action != "keep" or before != Decision("relabel", photo.label or ""):
            self.corrections.decide(photo.path, request.action, label)
        return self.photo(request.number)

    def undo(self) -> dict[str, Any]:
        """Take back the latest decision; the photo afterwards, or null."""
        number = self.number_of.get(self.corrections.undo() or "")
        return {"photo": None if number is None else self.photo(number)}

    def picture(self, number: int, side: Annotated[int, Query(ge=32, le=1600)] = 240) -> Response:
        """A photo as JPEG; large ones are for one look, only thumbnails are kept."""
        self._require_photo(number)
        content = (self.thumbnail if side <= 320 else thumbnail)(self.files[number], side, self.decoding)
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "no-store"})

    def attention(self, number: int, label: str) -> dict[str, Any]:
        """Return where the model looks in a photo for a class."""
        if self.look is None or label not in self.classes:
            raise HTTPException(404, "there is no map of this photo and class")
        self._require_photo(number)
        return self.look(number, self.classes.index(label))

    def _require_photo(self, number: int) -> None:
        if not 0 <= number < len(self.files):
            raise HTTPException(404, f"there is no photo {number}")

    def _view(self, view: str, which: int) -> list[int]:
        whole = {"suggested": list(range(len(self.suggested))), "suspects": self._suspects, "losses": self._highest}
        if view in whole:
            return whole[view]
        if view == "marked":
            return self._present(reversed(list(self.corrections.decisions)))
        if view == "pair" and 0 <= which < len(self.pairs):
            return self._numbers(self.pairs[which][2])
        if view == "class" and 0 <= which < len(self.classes):
            return self._by_class[self.classes[which]]
        raise DataError(f"there is no view {view!r} number {which}")

    def _numbers(self, rows: Iterable[int]) -> list[int]:
        return self._present(self.held_out.paths[int(row)] for row in rows)

    def _present(self, paths: Iterable[str]) -> list[int]:
        """Numbers in the index; photos that are no longer in it are left out."""
        return [self.number_of[path] for path in paths if path in self.number_of]

    def _find(self) -> None:
        try:
            self._duplicates = list(self.find_duplicates())
            self._duplicates_state = "done"
        except (FieldmarkError, OSError) as error:
            self._duplicates_state = f"failed: {error}"


def _printable(text: str) -> str:
    """Text as JSON takes it: bytes that are not UTF-8 become question marks."""
    return text.encode("utf-8", "replace").decode()


async def require_json(request: Request) -> None:
    """Refuse a form of another site: it cannot send JSON without asking first, and is never told yes."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise HTTPException(415, "send JSON")


def open_review(runs: list[Run], table: Path, *, max_distance: int) -> FastAPI:
    """The app over one run, or over the folds of a cross-validation, and over a table of corrections.

    Near-duplicates are at most `max_distance` bits of 64 apart.
    """
    index = runs[0].split
    if not any(file.is_file() for file in index.files()[:100]):
        raise DataError(f"the photos of {runs[0].path} are not under {index.root} any more: put them back")
    views = ReviewViews(
        index,
        triage.join_held_out(runs),
        Corrections(table),
        find_duplicates=lambda: triage.near_duplicates(index, max_distance=max_distance),
        look=_attention(runs[0], index.files()),
        decoding=runs[0].decode_spec(),
        source=runs[0].config.data.path,
    )
    decided = [path for path, one in views.corrections.decisions.items() if one.action != "drop"]
    known = [path in views.number_of or (Path(index.root) / path).exists() for path in decided]
    if known and not any(known):
        raise DataError(f"{table} holds decisions about the photos of another data set: give another --out")
    return create_review_app(views)


def open_labeling(run: Run, listing: Path, table: Path) -> FastAPI:
    """The app over a list of photos without labels, as `fieldmark suggest` writes it, and over a table of labels.

    The list is a table with the column `path`, relative to it or absolute; `label` and `why` are shown where they are
    there. In a table of labels elsewhere the paths are absolute.
    """
    content = read_table(require_path(listing))
    paths = content.column("path", is_text=False)
    folder = listing.absolute().parent
    if table.absolute().parent != folder:
        paths = [str(folder / path) for path in paths]
    index = PhotoIndex(folder, Photos.of(Photo(path, None, "", "") for path in paths), run.classes, {})
    if not any(file.is_file() for file in index.files()):
        raise DataError(f"{listing} names no photo that is there: keep the list where `fieldmark suggest` wrote it")
    guesses, reasons = content.optional_column("label"), content.optional_column("why")
    suggested = [{"guess": guess or None, "why": why} for guess, why in zip(guesses, reasons, strict=True)]
    nothing = HeldOut((), np.zeros(0, np.int64), np.zeros((0, len(run.classes)), np.float32), run.classes)
    views = ReviewViews(
        index,
        nothing,
        Corrections(table, LABELS),
        find_duplicates=list,
        look=_attention(run, index.files()),
        decoding=run.decode_spec(),
        suggested=suggested,
        model=run.path,
    )
    return create_review_app(views)


def create_review_app(views: ReviewViews) -> FastAPI:
    """The ASGI app over ready views."""
    app = FastAPI(title="Fieldmark review", docs_url=None, redoc_url=None)

    async def refuse(_: Request, error: Exception) -> Response:
        if isinstance(error, PhotoError):
            return JSONResponse({"detail": error.reason}, status_code=404)
        return JSONResponse({"detail": str(error)}, status_code=422)

    for kind in (FieldmarkError, OSError):
        app.add_exception_handler(kind, refuse)
    app.state.views = views
    routes = {"/api/overview": views.overview, "/api/photos": views.page, "/photo/{number}": views.picture}
    for path, method in {**routes, "/api/attention/{number}": views.attention}.items():
        app.add_api_route(path, method)
    for method in (views.decide, views.undo):
        app.add_api_route(f"/api/{method.__name__}", method, methods=["POST"], dependencies=[Depends(require_json)])
    finish_app(app, {"/": "review.html"}, ServerMetrics(), limits=_LIMITS, access=Access())
    return app


def _attention(run: Run, files: Sequence[PhotoFile]) -> Look | None:
    """Maps by the run's model, computed when they are asked for."""
    if run.is_ensemble:
        return None
    maps = AttentionMaps(run.load_model(), size=run.eval_spec().size)
    if not maps.is_available:
        return None
    spec, decoding = run.eval_spec(), run.decode_spec()

    def look(number: int, class_number: int) -> dict[str, Any]:
        picture, box = prepare_photo(files[number], decoding, spec)
        return {"attention": maps(picture[None], [class_number])[0].round(3).tolist(), "seen": list(box)}

    return look
