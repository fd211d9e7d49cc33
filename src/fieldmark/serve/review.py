"""The review page: where the model errs, and a table of what to do about it. The photos themselves are only read."""

# Without `from __future__ import annotations`: FastAPI reads the annotations of functions that are defined in others.

import shlex
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel

from fieldmark.data.index import PhotoIndex
from fieldmark.data.tables import read_table, write_csv
from fieldmark.errors import DataError, FieldmarkError, MissingExtraError, PhotoError
from fieldmark.inference.triage import (
    ConfusedPair,
    HeldOut,
    confused_pairs,
    highest_losses,
    join_held_out,
    label_suspects,
    near_duplicates,
)
from fieldmark.runs.folder import Run
from fieldmark.serve.app import add_pages, observe
from fieldmark.serve.limits import Access, Limits, RequestLimits
from fieldmark.serve.service import ServerMetrics, seen_box, thumbnail

ACTIONS = ("keep", "relabel", "drop")
COLUMNS = ("path", "action", "label")


class Decision(NamedTuple):
    """What to do with one photo; `label` is the new one of a relabeled photo, else ""."""

    action: str
    label: str


class Corrections:
    """Decisions by path, written to disk after each change. Calls from several threads are safe.

    Raises:
        DataError: The table cannot be read, is no table of corrections, or would not be read by `train`.
    """

    def __init__(self, file: Path) -> None:
        if file.suffix.lower() != ".csv":
            raise DataError(f"corrections are written as CSV, and {file} does not end in .csv: give another --out")
        self.file = file
        self._lock = threading.Lock()
        self._decisions = self._read() if file.is_file() else {}
        # Each change with what was there before; decisions of earlier sessions can be undone too, newest first.
        self._history: list[tuple[str, Decision | None]] = [(path, None) for path in self._decisions]

    def get(self, path: str) -> Decision | None:
        """The decision about a photo, if there is one."""
        return self._decisions.get(path)

    def paths(self) -> list[str]:
        """Photos with a decision, the oldest first."""
        return list(self._decisions)

    def decide(self, path: str, action: str, label: str) -> None:
        """Decide about a photo; an earlier decision is replaced.

        Raises:
            ResourceError: The table cannot be written; the decision is not taken.
        """
        with self._lock:
            self._write(path, Decision(action, label if action == "relabel" else ""))

    def undo(self) -> str | None:
        """Take back the latest change; its path, or None if there is none."""
        with self._lock:
            if not self._history:
                return None
            path, before = self._history[-1]
            self._write(path, before)
            del self._history[-2:]  # the change, and that it was taken back
            return path

    def _write(self, path: str, decision: Decision | None) -> None:
        """Write the table with another decision about one photo, and only then take it."""
        decisions = {key: value for key, value in self._decisions.items() if key != path}
        if decision:
            decisions[path] = decision
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_csv(self.file, COLUMNS, [(key, *value) for key, value in decisions.items()])
        self._history.append((path, self._decisions.get(path)))
        self._decisions = decisions

    def _read(self) -> dict[str, Decision]:
        table = read_table(self.file)
        if not set(COLUMNS) <= table.values.keys() or not set(ACTIONS) >= set(table.values["action"]):
            raise DataError(
                f"{self.file} is not a table of corrections (path,action,label): give another --out, or fix it"
            )
        rows = zip(*(table.column(name, is_text=name != "path") for name in COLUMNS), strict=True)
        return {path: Decision(action, label) for path, action, label in rows}


DuplicateSearch = Callable[[], Sequence[tuple[int, int, int]]]


class ReviewViews:
    """Orders the photos of a run by why they deserve a look.

    Args:
        index: All photos of the run.
        judged: Predictions of those that the model was not trained on.
        corrections: Decisions so far.
        find_duplicates: Looks for near-duplicates; called once, on a thread of its own.
    """

    def __init__(
        self, index: PhotoIndex, judged: HeldOut, corrections: Corrections, *, find_duplicates: DuplicateSearch
    ) -> None:
        self.index = index
        self.judged = judged
        self.corrections = corrections
        self.classes = judged.classes
        self._number_of = {photo.path: number for number, photo in enumerate(index.photos)}
        self._place_of = {path: place for place, path in enumerate(judged.paths)}
        self._number_at = [self._number_of.get(path, -1) for path in judged.paths]
        self._guesses, self._losses = judged.guesses, judged.losses
        self.pairs: list[ConfusedPair] = confused_pairs(judged)
        self._suspects = self._numbers(label_suspects(judged))
        self._highest = self._numbers(highest_losses(judged))
        self._duplicates: list[tuple[int, int, int]] = []
        self.duplicates_state = "searching"
        self._by_class: dict[str, list[int]] = {name: [] for name in self.classes}
        for number, photo in enumerate(index.photos):
            if photo.label in self._by_class:
                self._by_class[photo.label].append(number)
        self._search = threading.Thread(target=self._find, args=(find_duplicates,), daemon=True)
        self._search.start()

    def overview(self) -> dict[str, Any]:
        """Names and sizes of the views."""
        return {
            "classes": [{"name": name, "photos": len(self._by_class[name])} for name in self.classes],
            "photos": len(self.index.photos),
            "judged": len(self.judged.paths),
            "suspects": len(self._suspects),
            "losses": len(self._highest),
            "pairs": [
                {"first": self.classes[pair.first], "second": self.classes[pair.second], "photos": len(pair.places)}
                for pair in self.pairs[:200]
            ],
            "duplicates": len(self._duplicates),
            "duplicates_state": self.duplicates_state,
            "marked": len(self.corrections.paths()),
            "table": self.corrections.file.name,
            "command": self._next_command().encode("utf-8", "replace").decode(),
        }

    def _next_command(self) -> str:
        table = shlex.quote(f"data.corrections={self.corrections.file}")
        return f"fieldmark train {shlex.quote(str(self.index.root))} --set {table}"

    def page(self, view: str, *, which: int, offset: int, limit: int) -> dict[str, Any]:
        """Photos of one view from `offset` on.

        Args:
            view: "suspects", "losses", "pair", "class", "duplicates" or "marked".
            which: The pair's place among the pairs, or the class number.
            offset: First row.
            limit: Most rows.

        Raises:
            DataError: There is no such view.
        """
        if view == "duplicates":
            rows = self._duplicates[offset : offset + limit]
            photos = [
                {**self.photo(number), "near": place + offset, "bits": bits}
                for place, (left, right, bits) in enumerate(rows)
                for number in (left, right)
            ]
            return {"total": len(self._duplicates), "next": offset + len(rows), "photos": photos}
        numbers = self._view(view, which)
        chosen = numbers[offset : offset + limit]
        photos = [self.photo(number) for number in chosen]
        return {"total": len(numbers), "next": offset + len(chosen), "photos": photos}

    def photo(self, number: int) -> dict[str, Any]:
        """What the page says of one photo."""
        photo = self.index.photos[number]
        decision = self.corrections.get(photo.path)
        place = self._place_of.get(photo.path)
        known: dict[str, Any] = {"guess": None, "probability": None, "loss": None}
        if place is not None:
            guess = int(self._guesses[place])
            probability = float(self.judged.probabilities[place, guess])
            known = {"guess": self.classes[guess], "probability": probability, "loss": float(self._losses[place])}
        return {
            "number": number,
            "path": photo.path.encode("utf-8", "replace").decode(),
            "label": photo.label,
            "split": photo.split,
            **known,
            "action": decision.action if decision else None,
            "new_label": decision.label if decision else None,
        }

    def decide(self, number: int, action: str, label: str) -> dict[str, Any]:
        """Decide about a photo; the photo afterwards.

        Raises:
            DataError: No such action or class.
        """
        if action == "relabel" and label not in self.classes:
            raise DataError(f"{label!r} is not one of the {len(self.classes)} classes")
        self.corrections.decide(self.index.photos[number].path, action, label)
        return self.photo(number)

    def undo(self) -> dict[str, Any] | None:
        """Take back the latest decision; the photo afterwards, or None."""
        path = self.corrections.undo()
        number = self._number_of.get(path) if path is not None else None
        return None if number is None else self.photo(number)

    def _view(self, view: str, which: int) -> list[int]:
        if view == "suspects":
            return self._suspects
        if view == "losses":
            return self._highest
        if view == "marked":
            found = [self._number_of.get(path, -1) for path in reversed(self.corrections.paths())]
            return [number for number in found if number >= 0]
        if view == "pair" and 0 <= which < len(self.pairs):
            return self._numbers(self.pairs[which].places)
        if view == "class" and 0 <= which < len(self.classes):
            return self._by_class[self.classes[which]]
        raise DataError(f"there is no view {view!r} number {which}")

    def _numbers(self, places: Any) -> list[int]:
        """Numbers in the index of judged photos; photos that are no longer in the index are left out."""
        found = [self._number_at[int(place)] for place in np.asarray(places, np.int64)]
        return [number for number in found if number >= 0]

    def _find(self, find_duplicates: DuplicateSearch) -> None:
        try:
            self._duplicates = list(find_duplicates())
            self.duplicates_state = "done"
        except (FieldmarkError, OSError) as error:
            self.duplicates_state = f"failed: {error}"


_FILES = {
    "review.css": "text/css",
    "app.css": "text/css",
    "review.js": "text/javascript",
    "attention.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
_THUMBNAILS_KEPT = 4000  # about 15 KB each
# A request here is a decision of some hundred bytes.
_LIMITS = Limits(
    max_body_bytes=64 * 1024,
    max_held_bytes=2**20,
    max_photos=0,
    max_pixels=0,
    max_queued=0,
    body_seconds=10.0,
    answer_seconds=60.0,
    retry_seconds=2,
)

Look = Callable[[int, int], dict[str, Any]]


class Wish(BaseModel):
    """A decision about one photo."""

    number: int
    action: Literal["keep", "relabel", "drop"]
    label: str = ""


def open_review(runs: list[Run], table: Path, *, max_distance: int, threads: int, memory: Path) -> Any:
    """The app over one run, or over the folds of a cross-validation.

    Args:
        runs: Their photos must still be where they were.
        table: Corrections, read and written.
        max_distance: Near-duplicates differ in at most so many of 64 bits.
        threads: Photos read at once in the search for near-duplicates.
        memory: Folder where that search remembers what it saw.

    Raises:
        DataError: The runs do not belong together, or the photos are gone.
    """
    index = runs[0].split
    if not any(file.is_file() for file in index.files()[:100]):
        raise DataError(
            f"the photos of {runs[0].path} are not under {index.root} any more: put them back to review them"
        )
    views = ReviewViews(
        index,
        join_held_out(runs),
        Corrections(table),
        find_duplicates=lambda: near_duplicates(index, max_distance=max_distance, threads=threads, memory=memory),
    )
    return create_review_app(views, look=_attention(runs[0], index.files()))


def create_review_app(views: ReviewViews, *, look: Look | None) -> Any:
    """The ASGI app over ready views.

    Args:
        views: What is shown.
        look: (photo number, class number) -> the map and its box; None if the model has no maps.

    Raises:
        MissingExtraError: fastapi is not installed.
    """
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse
    except ImportError as error:
        raise MissingExtraError(error.name or "fastapi", "serve") from None
    app = FastAPI(title="Fieldmark review", docs_url=None, redoc_url=None)

    @app.exception_handler(DataError)
    async def refused(_: Request, error: DataError) -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        return JSONResponse({"detail": str(error)}, status_code=422)

    _add_views(app, views, look)
    _add_decisions(app, views)
    _add_photos(app, views, look)
    add_pages(app, {"/": "review.html"}, _FILES)
    observe(app, ServerMetrics())
    app.add_middleware(RequestLimits, limits=_LIMITS, access=Access())  # type: ignore[arg-type]
    return app


def _add_views(app: Any, views: ReviewViews, look: Look | None) -> None:
    from fastapi import Query

    @app.get("/api/overview")
    def overview() -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        return {**views.overview(), "has_attention": look is not None}

    @app.get("/api/photos")
    def photos(  # pyright: ignore[reportUnusedFunction]
        view: str,
        which: int = 0,
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=200)] = 60,
    ) -> dict[str, Any]:
        return views.page(view, which=which, offset=offset, limit=limit)


def _add_decisions(app: Any, views: ReviewViews) -> None:
    from fastapi import Request
    from fastapi.responses import JSONResponse

    def is_foreign(request: Request) -> bool:
        # A form of another site cannot send JSON without asking first, and is never told yes.
        return request.headers.get("content-type", "").split(";")[0].strip() != "application/json"

    @app.post("/api/decide")
    def decide(wish: Wish, request: Request) -> Any:  # pyright: ignore[reportUnusedFunction]
        if is_foreign(request):
            return JSONResponse({"detail": "send JSON"}, status_code=415)
        if not 0 <= wish.number < len(views.index.photos):
            return JSONResponse({"detail": f"there is no photo {wish.number}"}, status_code=404)
        return views.decide(wish.number, wish.action, wish.label)

    @app.post("/api/undo")
    def undo(request: Request) -> Any:  # pyright: ignore[reportUnusedFunction]
        if is_foreign(request):
            return JSONResponse({"detail": "send JSON"}, status_code=415)
        return {"photo": views.undo()}


def _add_photos(app: Any, views: ReviewViews, look: Look | None) -> None:
    from fastapi import Query, Response
    from fastapi.responses import JSONResponse

    files = views.index.files()
    kept = lru_cache(maxsize=_THUMBNAILS_KEPT)(thumbnail)

    @app.get("/photo/{number}")
    def photo(number: int, side: Annotated[int, Query(ge=32, le=1600)] = 240) -> Response:  # pyright: ignore[reportUnusedFunction]
        if not 0 <= number < len(files):
            return JSONResponse({"detail": f"there is no photo {number}"}, status_code=404)
        try:
            # Large ones are for one look; only thumbnails are worth keeping.
            content = (kept if side <= 320 else thumbnail)(files[number], side)
        except PhotoError as error:
            return JSONResponse({"detail": error.reason}, status_code=404)
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    @app.get("/api/attention/{number}")
    def attention(number: int, label: str) -> Any:  # pyright: ignore[reportUnusedFunction]
        if look is None or not 0 <= number < len(files) or label not in views.classes:
            return JSONResponse({"detail": "there is no map of this photo and class"}, status_code=404)
        try:
            return look(number, views.classes.index(label))
        except PhotoError as error:
            return JSONResponse({"detail": error.reason}, status_code=404)


def _attention(run: Run, files: list[Path]) -> Look | None:
    """Maps by the run's model, computed when they are asked for."""
    from fieldmark.augment.reference import eval_reference
    from fieldmark.inference.triage import AttentionMaps

    if run.is_ensemble:
        return None
    maps = AttentionMaps(run.load_model())
    if not maps.is_available:
        return None
    spec, decoding = run.eval_spec(), run.decode_spec()

    def look(number: int, class_number: int) -> dict[str, Any]:
        photo = decoding.read(files[number])
        found: Any = maps(eval_reference(photo, spec).numpy()[None], [class_number])
        return {
            "attention": found[0].round(3).tolist(),
            "seen": list(seen_box(photo.shape[1], photo.shape[0], spec)),
        }

    return look
