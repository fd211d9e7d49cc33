"""The server: photos in, named probabilities out, over HTTP, and a page for people.

Made for 127.0.0.1 and for standing behind a proxy. Every answer is the model's or a reason that the client can act on;
file names, paths and tracebacks stay here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile

from fieldmark.runs.environment import package_versions
from fieldmark.serve.limits import HTTP, Access, Limits, RequestLimits
from fieldmark.serve.service import Classes, Health, PhotoAnswers, PhotoService, Problem, ServedModel, ServerMetrics

_LOG = logging.getLogger(__name__)
_VERSION = package_versions(["fieldmark"]).get("fieldmark", "unknown")
_COUNTED = {"/predict", "/health", "/classes", "/metrics", "/"}
_STATIC = resources.files("fieldmark.serve") / "static"
# Not by the system's list of types, which may call a script plain text.
_MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".html": "text/html"}
_REFUSALS: dict[Any, Any] = {int(n): {"model": Problem, "description": why} for n, why in HTTP["refusals"].items()}
_GENERAL_REFUSALS = {status: refusal for status, refusal in _REFUSALS.items() if status not in (422, 503)}
# The names that clients of other servers use, too.
_FIELDS = ("photos", "photo", "files", "file", "images", "image", "photos[]", "files[]", "images[]")
_router = APIRouter()


def create_app(model: ServedModel, *, limits: Limits, access: Access, decode_threads: int) -> FastAPI:
    """The ASGI app; `decode_threads` photos are decoded at once."""
    # A line for each malformed form: strangers could fill the log, and a log that nobody reads stops the server.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    service = PhotoService(model, limits, decode_threads=decode_threads)
    app = FastAPI(
        title="Fieldmark",
        summary=f"Names for photographs, from {len(model.classes)} classes.",
        version=_VERSION,
        lifespan=service.run,
        docs_url=None,  # both load scripts from elsewhere; /docs is a page of our own
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(_router)
    add_pages(app, {"/": "index.html", "/docs": "docs.html"})
    observe(app, service.metrics)
    app.add_middleware(RequestLimits, limits=limits, access=access)
    return app


def open_app(path: Path, decode_threads: int, *, limits: Limits, access: Access) -> FastAPI:
    """`create_app` of a run folder, an ensemble or an export."""
    return create_app(ServedModel(path), limits=limits, access=access, decode_threads=decode_threads)


async def _find_service(request: Request) -> PhotoService:
    return request.app.state.service


Service = Annotated[PhotoService, Depends(_find_service)]


async def _read_photos(request: Request) -> list[bytes]:
    """The photos of a request: files of a form, or the body itself."""
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


@_router.post("/predict", responses=_REFUSALS, openapi_extra={"requestBody": HTTP["body"]})
async def predict(
    request: Request,
    service: Service,
    top: Annotated[int, Query(ge=1, le=1000, description="How many classes to name.")] = 5,
    attention: Annotated[bool, Query(description="Also say where the model looked. Slower.")] = False,
) -> PhotoAnswers:
    """Name what is in the photos. A photo that cannot be read keeps its position, with its `problem`."""
    contents = await _read_photos(request)
    most = service.limits.max_photos
    if len(contents) > most:
        raise HTTPException(413, f"{len(contents)} photos in one request; at most {most} are taken")
    answers = await service.answer(contents, top=top, wants_attention=attention)
    if all(answer.problem for answer in answers):
        raise HTTPException(422, "; ".join(f"photo {n} {answer.problem}" for n, answer in enumerate(answers, start=1)))
    return PhotoAnswers(model=service.model.name, threshold=service.model.threshold, photos=answers)


@_router.get("/health")
async def health(service: Service) -> Health:
    """Whether the server answers, and with what."""
    model = service.model
    return Health(
        status="ok",
        version=_VERSION,
        model=model.name,
        classes=len(model.classes),
        accuracy=model.accuracy,
        is_calibrated=model.is_calibrated,
        waiting=service.num_waiting,
        has_attention=model.has_attention,
        examples=len(model.examples),
        max_photos=service.limits.max_photos,
    )


@_router.get("/examples/{number}", include_in_schema=False)
async def example(number: int, service: Service) -> Response:
    """A photo that the page offers to try."""
    if not 0 <= number < len(service.model.examples):
        raise HTTPException(404, f"there is no example {number}")
    return Response(service.model.examples[number], media_type="image/jpeg")


@_router.get("/classes", responses=_GENERAL_REFUSALS)
async def classes(service: Service) -> Classes:
    """Names of the classes, in order of class number."""
    return Classes(classes=list(service.model.classes), threshold=service.model.threshold)


@_router.get("/metrics", responses={**_GENERAL_REFUSALS, 200: {"content": {"text/plain": {}}}}, response_class=Response)
async def metrics(service: Service) -> Response:
    """Counters for Prometheus."""
    service.metrics.waiting.set(service.num_waiting)
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def add_pages(app: FastAPI, pages: dict[str, str]) -> None:
    """Serve HTML files by path, and all files of the pages under /static."""
    names = {file.name for file in _STATIC.iterdir()}

    async def serve_file(request: Request, name: str = "") -> Response:
        name = name or request.path_params["name"]
        if name not in names:
            raise HTTPException(404, "there is no such file")
        return Response((_STATIC / name).read_bytes(), media_type=f"{_MEDIA_TYPES[Path(name).suffix]}; charset=utf-8")

    for path, name in {**pages, "/static/{name}": ""}.items():
        app.add_route(path, partial(serve_file, name=name), include_in_schema=False)


def observe(app: FastAPI, metrics: ServerMetrics) -> None:
    """Count requests, and answer errors without what they hold inside."""

    async def refuse(_: Request, error: Exception) -> Response:
        # FastAPI's own answer repeats the input, which may be megabytes of bytes.
        assert isinstance(error, RequestValidationError)
        reasons = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        return JSONResponse({"detail": "; ".join(reasons)[:2000]}, status_code=422)

    async def watch(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
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

    app.add_exception_handler(RequestValidationError, refuse)
    app.middleware("http")(watch)
