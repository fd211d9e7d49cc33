"""The server: photos in, named probabilities out, over HTTP, and a page for people.

Made for 127.0.0.1 and for standing behind a proxy. Every answer is the model's or a reason that the client can act on;
file names, paths and tracebacks stay here.
"""

import importlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib import metadata, resources
from pathlib import Path
from typing import Annotated, Any

from fieldmark.errors import MissingExtraError
from fieldmark.serve.limits import Access, Limits, RequestLimits
from fieldmark.serve.service import (
    Accuracy,
    BusyError,
    Classes,
    Health,
    PhotoAnswers,
    PhotoService,
    Problem,
    ServedModel,
    ServerMetrics,
)

# Without `from __future__ import annotations`: FastAPI reads the annotations of functions that are defined in others.


_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The body is not a form with photos, or the Host is another server's."},
    401: {"model": Problem, "description": "The key is missing or wrong."},
    403: {"model": Problem, "description": "The page of another site asked, and it may not."},
    408: {"model": Problem, "description": "The body took too long to arrive."},
    413: {"model": Problem, "description": "The body or the number of photos is over the limit."},
    422: {"model": Problem, "description": "No photo could be read, or a parameter is out of range."},
    503: {"model": Problem, "description": "Too much to do: come back after Retry-After seconds."},
}
# The names that clients of other servers use, too.
_FIELDS = ("photos", "photo", "files", "file", "images", "image", "photos[]", "files[]", "images[]")
_PHOTO = {"type": "string", "format": "binary"}
_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["photos"],
                "properties": {"photos": {"type": "array", "minItems": 1, "items": _PHOTO}},
            }
        },
        **{kind: {"schema": _PHOTO} for kind in ("image/jpeg", "image/png", "image/webp", "application/octet-stream")},
    },
}


def create_app(
    model: ServedModel,
    *,
    limits: Limits,
    access: Access,
    max_batch: int,
    wait_seconds: float,
    decode_threads: int,
) -> Any:
    """The ASGI app.

    Args:
        model: What answers.
        limits: What a request may cost.
        access: Who may ask. The pages, their files and /health need no key.
        max_batch: Most photos in one pass of the model.
        wait_seconds: How long a photo waits for others when the model is idle.
        decode_threads: Photos decoded at once.

    Raises:
        MissingExtraError: fastapi or python-multipart is not installed.
    """
    for package in ("fastapi", "python_multipart", "prometheus_client"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise MissingExtraError(package.replace("_", "-"), "serve") from None
    from fastapi import FastAPI

    # A line for each malformed form: strangers could fill the log, and a log that nobody reads stops the server.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    service = PhotoService(
        model, limits=limits, max_batch=max_batch, wait_seconds=wait_seconds, decode_threads=decode_threads
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="Fieldmark",
        summary=f"Names for photographs, from {len(model.classes)} classes.",
        version=_version(),
        lifespan=lifespan,
        docs_url=None,  # both load scripts from elsewhere; /docs is a page of our own
        redoc_url=None,
    )
    _add_predict(app, service)
    _add_facts(app, service)
    add_pages(app, {"/": "index.html", "/docs": "docs.html"}, STATIC)
    observe(app, service.metrics)
    open_paths = {"/", "/docs", "/health", *(f"/static/{name}" for name in STATIC)}
    open_paths |= {f"/examples/{number}" for number in range(len(model.examples))}
    access = replace(access, open_paths=frozenset(open_paths))
    app.add_middleware(RequestLimits, limits=limits, access=access)  # type: ignore[arg-type]
    return app


def open_app(
    path: Path, decode_threads: int, *, limits: Limits, access: Access, max_batch: int, wait_seconds: float
) -> Any:
    """`create_app` of a run folder, an ensemble or an export."""
    return create_app(
        ServedModel.load(path),
        limits=limits,
        access=access,
        max_batch=max_batch,
        wait_seconds=wait_seconds,
        decode_threads=decode_threads,
    )


def _version() -> str:
    try:
        return metadata.version("fieldmark")
    except metadata.PackageNotFoundError:
        return "unknown"


async def _read_photos(request: Any) -> list[bytes]:
    """The photos of a request: files of a form, or the body itself.

    Raises:
        HTTPException: 400 or 422, with what to send instead.
    """
    from fastapi import HTTPException
    from starlette.datastructures import UploadFile

    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind.startswith("image/") or kind == "application/octet-stream":
        return [await request.body()]
    wanted = 'send files of a form (multipart/form-data) named "photos", or one photo as the body with its Content-Type'
    if kind != "multipart/form-data":
        raise HTTPException(422, wanted)
    try:
        async with request.form() as form:
            photos = [part for name in _FIELDS for part in form.getlist(name)]
            contents = [await part.read() for part in photos if isinstance(part, UploadFile)]
    except Exception:  # whatever the parser meets in bytes of strangers
        raise HTTPException(400, f"the form cannot be read; {wanted}") from None
    if not contents:
        raise HTTPException(422, f"the form has no file in a field named {', '.join(_FIELDS[:6])}; {wanted}")
    return contents


def _add_predict(app: Any, service: PhotoService) -> None:
    from fastapi import Query, Request
    from fastapi.responses import JSONResponse

    limits = service.limits

    @app.post("/predict", response_model=PhotoAnswers, responses=_REFUSALS, openapi_extra={"requestBody": _BODY})
    async def predict(  # pyright: ignore[reportUnusedFunction]
        request: Request,
        top: Annotated[int, Query(ge=1, le=1000, description="How many classes to name.")] = 5,
        attention: Annotated[bool, Query(description="Also say where the model looked. Slower.")] = False,
    ) -> Any:
        """Name what is in the photos. A photo that cannot be read keeps its position, with its `problem`."""
        contents = await _read_photos(request)
        if len(contents) > limits.max_photos:
            reason = f"{len(contents)} photos in one request; at most {limits.max_photos} are taken"
            return JSONResponse({"detail": reason}, status_code=413)
        try:
            answers = await service.answer(contents, top=top, wants_attention=attention)
        except BusyError as error:
            headers = {"Retry-After": str(limits.retry_seconds)}
            return JSONResponse({"detail": str(error)}, status_code=503, headers=headers)
        if all(answer.problem for answer in answers):
            reasons = [f"photo {number} {answer.problem}" for number, answer in enumerate(answers, start=1)]
            return JSONResponse({"detail": "; ".join(reasons)}, status_code=422)
        return PhotoAnswers(model=service.model.about.name, threshold=service.model.threshold, photos=answers)


def _add_facts(app: Any, service: PhotoService) -> None:
    from fastapi import Response
    from fastapi.responses import JSONResponse

    model = service.model
    refused = {status: _REFUSALS[status] for status in (400, 401, 403, 408, 413)}

    @app.get("/health")
    async def health() -> Health:  # pyright: ignore[reportUnusedFunction]
        """Whether the server answers, and with what."""
        accuracy = model.about.accuracy
        return Health(
            status="ok",
            version=_version(),
            model=model.about.name,
            classes=len(model.classes),
            accuracy=Accuracy(value=accuracy[0], low=accuracy[1], high=accuracy[2]) if accuracy else None,
            is_calibrated=model.about.is_calibrated,
            waiting=service.num_waiting,
            has_attention=model.has_attention,
            examples=len(model.examples),
            max_photos=service.limits.max_photos,
        )

    @app.get("/examples/{number}", include_in_schema=False)
    def example(number: int) -> Response:  # pyright: ignore[reportUnusedFunction]
        if not 0 <= number < len(model.examples):
            return JSONResponse({"detail": f"there is no example {number}"}, status_code=404)
        return Response(model.examples[number], media_type="image/jpeg")

    @app.get("/classes", responses=refused)
    async def classes() -> Classes:  # pyright: ignore[reportUnusedFunction]
        """Names of the classes, in order of class number."""
        return Classes(classes=list(model.classes), threshold=model.threshold)

    @app.get("/metrics", responses={**refused, 200: {"content": {"text/plain": {}}}}, response_class=Response)
    async def metrics() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Counters for Prometheus."""
        service.metrics.waiting.set(service.num_waiting)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


STATIC = {
    "app.css": "text/css",
    "app.js": "text/javascript",
    "attention.js": "text/javascript",
    "docs.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
_COUNTED = {"/predict", "/health", "/classes", "/metrics", "/"}
_LOG = logging.getLogger(__name__)


def static_text(name: str) -> str:
    """A file of the page."""
    return (resources.files("fieldmark.serve") / "static" / name).read_text(encoding="utf-8")


def add_pages(app: Any, pages: dict[str, str], files: dict[str, str]) -> None:
    """Serve HTML files by path, and `files` (name -> media type) under /static."""
    from fastapi import Response
    from fastapi.responses import JSONResponse

    def add_page(path: str, file: str) -> None:
        @app.get(path, include_in_schema=False)
        async def page() -> Response:  # pyright: ignore[reportUnusedFunction]
            return Response(static_text(file), media_type="text/html; charset=utf-8")

    for path, file in pages.items():
        add_page(path, file)

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        if name not in files:
            return JSONResponse({"detail": "there is no such file"}, status_code=404)
        return Response(static_text(name), media_type=f"{files[name]}; charset=utf-8")


def observe(app: Any, metrics: ServerMetrics) -> None:
    """Count requests, and answer errors without what they hold inside."""
    from fastapi import Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:  # pyright: ignore[reportUnusedFunction]
        # FastAPI's own answer repeats the input, which may be megabytes of bytes.
        reasons = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        return JSONResponse({"detail": "; ".join(reasons)[:2000]}, status_code=422)

    @app.middleware("http")
    async def watch(  # pyright: ignore[reportUnusedFunction]
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        start = time.perf_counter()
        try:
            response = await call_next(request)
        except Exception:
            _LOG.exception("a request failed")  # the traceback is for the server's log alone
            response = JSONResponse({"detail": "the server failed on this request"}, status_code=500)
        path = request.url.path if request.url.path in _COUNTED else "other"
        metrics.requests.labels(path, str(response.status_code)).inc()
        metrics.seconds.labels(path).observe(time.perf_counter() - start)
        return response
