"""The review page: where the model errs, and a table of what to do about it. The photos themselves are only read."""

# Without `from __future__ import annotations`: FastAPI reads the annotations of functions that are defined in others.

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel

from fieldmark.errors import DataError, MissingExtraError, PhotoError
from fieldmark.experiment.folder import Run
from fieldmark.outputs.triage import join_judged, near_duplicates
from fieldmark.serve.backend import seen_box
from fieldmark.serve.corrections import Corrections
from fieldmark.serve.metrics import ServerMetrics
from fieldmark.serve.pages import add_pages, observe
from fieldmark.serve.review_views import ReviewViews
from fieldmark.serve.thumbnails import thumbnail

_FILES = {
    "review.css": "text/css",
    "app.css": "text/css",
    "review.js": "text/javascript",
    "attention.js": "text/javascript",
}
_THUMBNAILS_KEPT = 4000  # about 15 KB each

Look = Callable[[int, int], dict[str, Any]]


class Wish(BaseModel):
    """A decision about one photo."""

    number: int
    action: Literal["keep", "relabel", "drop"]
    label: str = ""


def open_review(
    runs: list[Run], table: Path, *, max_distance: int, threads: int, memory: Path, hosts: list[str]
) -> Any:
    """The app over one run, or over the folds of a cross-validation.

    Args:
        runs: Their photos must still be where they were.
        table: Corrections, read and written.
        max_distance: Near-duplicates differ in at most so many of 64 bits.
        threads: Photos read at once in the search for near-duplicates.
        memory: Folder where that search remembers what it saw.
        hosts: Names by which the server may be addressed.

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
        join_judged(runs),
        Corrections(table),
        find_duplicates=lambda: near_duplicates(index, max_distance=max_distance, threads=threads, memory=memory),
    )
    return create_review_app(views, look=_attention(runs[0], index.files()), hosts=hosts)


def create_review_app(views: ReviewViews, *, look: Look | None, hosts: list[str]) -> Any:
    """The ASGI app over ready views.

    Args:
        views: What is shown.
        look: (photo number, class number) -> the map and its box; None if the model has no maps.
        hosts: See `open_review`.

    Raises:
        MissingExtraError: fastapi is not installed.
    """
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError as error:
        raise MissingExtraError(error.name or "fastapi", "serve") from None
    app = FastAPI(title="Fieldmark review", docs_url=None, redoc_url=None)

    @app.exception_handler(DataError)
    async def refused(_: Request, error: DataError) -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        return JSONResponse({"detail": str(error)}, status_code=422)

    _add_views(app, views, look)
    _add_decisions(app, views)
    _add_photos(app, views, look)
    add_pages(app, page="review.html", files=_FILES)
    observe(app, ServerMetrics())
    # Another site that points its own name at this machine must not read the photos (DNS rebinding).
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)  # type: ignore[arg-type]
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
    from fieldmark.data.decode import decode
    from fieldmark.outputs.attention import AttentionMaps
    from fieldmark.vision.augment import eval_reference

    if run.is_ensemble:
        return None
    maps = AttentionMaps(run.load_model())
    if not maps.is_available:
        return None
    spec, settings = run.eval_spec(), run.config.data

    def look(number: int, class_number: int) -> dict[str, Any]:
        photo = decode(files[number], background=settings.background, max_pixels=settings.max_pixels)
        found: Any = maps(eval_reference(photo, spec).numpy()[None], [class_number])
        return {
            "attention": found[0].round(3).tolist(),
            "seen": list(seen_box(photo.shape[1], photo.shape[0], spec)),
        }

    return look
