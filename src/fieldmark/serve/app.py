"""The server: photos in, named probabilities out, over HTTP, and a page for people.

Made for 127.0.0.1 and for standing behind a proxy. Every answer is the model's or a reason that the client can act on;
file names, paths and tracebacks stay here.
"""

import importlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from fieldmark.errors import MissingExtraError
from fieldmark.serve.limits import Gate, Limits
from fieldmark.serve.service import (
    BusyError,
    Classes,
    Health,
    PhotoAnswers,
    PhotoModel,
    PhotoService,
    Problem,
    ServedModel,
    ServerMetrics,
)

# Without `from __future__ import annotations`: FastAPI reads the annotations of functions that are defined in others.


_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The body is not a form with photos."},
    401: {"model": Problem, "description": "The key is missing or wrong."},
    408: {"model": Problem, "description": "The body took too long to arrive."},
    413: {"model": Problem, "description": "The body or the number of photos is over the limit."},
    422: {"model": Problem, "description": "No photo could be read, or a parameter is out of range."},
    503: {"model": Problem, "description": "Too much to do: come back after Retry-After seconds."},
}


def create_app(
    model: PhotoModel,
    *,
    limits: Limits,
    max_batch: int,
    wait_seconds: float,
    decode_threads: int,
    api_key: str | None,
) -> Any:
    """The ASGI app.

    Args:
        model: What answers.
        limits: What is refused.
        max_batch: Most photos in one pass of the model.
        wait_seconds: How long a photo waits for company when the model is idle.
        decode_threads: Photos decoded at once.
        api_key: What clients must send, or None. The page, its files and /health need none.

    Raises:
        MissingExtraError: fastapi or python-multipart is not installed.
    """
    for package in ("fastapi", "python_multipart", "prometheus_client"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise MissingExtraError(package.replace("_", "-"), "serve") from None
    from fastapi import FastAPI

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
        version="1",
        lifespan=lifespan,
        docs_url=None,  # both pages load scripts from elsewhere
        redoc_url=None,
    )
    _add_predict(app, service)
    _add_facts(app, service)
    add_pages(app)
    observe(app, service.metrics)
    open_paths = frozenset({"/", "/health", *(f"/static/{name}" for name in STATIC)})
    open_paths |= {f"/examples/{number}" for number in range(model.num_examples)}
    app.add_middleware(Gate, limits=limits, api_key=api_key, open_paths=open_paths)  # type: ignore[arg-type]
    return app


def open_app(
    path: Path, decode_threads: int, *, limits: Limits, max_batch: int, wait_seconds: float, api_key: str | None
) -> Any:
    """`create_app` of a run folder, an ensemble or an export."""
    return create_app(
        ServedModel.load(path),
        limits=limits,
        max_batch=max_batch,
        wait_seconds=wait_seconds,
        decode_threads=decode_threads,
        api_key=api_key,
    )


def _add_predict(app: Any, service: PhotoService) -> None:
    from fastapi import File, Query, UploadFile
    from fastapi.responses import JSONResponse

    limits = service.limits

    @app.post("/predict", response_model=PhotoAnswers, responses=_REFUSALS)
    async def predict(  # pyright: ignore[reportUnusedFunction]
        photos: Annotated[
            list[UploadFile], File(min_length=1, description="One or more photos, of any format that Pillow reads.")
        ],
        top: Annotated[int, Query(ge=1, le=1000, description="How many classes to name.")] = 5,
        attention: Annotated[bool, Query(description="Also say where the model looked. Slower.")] = False,
    ) -> Any:
        """Name what is in the photos. A photo that cannot be read keeps its place, with its `problem`."""
        if len(photos) > limits.max_photos:
            reason = f"{len(photos)} photos in one request; at most {limits.max_photos} are taken"
            return JSONResponse({"detail": reason}, status_code=413)
        contents = [await photo.read() for photo in photos]
        try:
            answers = await service.answer(contents, top=top, wants_attention=attention)
        except BusyError as error:
            headers = {"Retry-After": str(limits.retry_seconds)}
            return JSONResponse({"detail": str(error)}, status_code=503, headers=headers)
        if all(answer.problem for answer in answers):
            reasons = [f"photo {place} {answer.problem}" for place, answer in enumerate(answers, start=1)]
            return JSONResponse({"detail": "; ".join(reasons)}, status_code=422)
        return PhotoAnswers(model=service.model.name, threshold=service.model.threshold, photos=answers)


def _add_facts(app: Any, service: PhotoService) -> None:
    from fastapi import Response
    from fastapi.responses import JSONResponse

    model = service.model
    refused = {status: _REFUSALS[status] for status in (401, 408, 413)}

    @app.get("/health")
    async def health() -> Health:  # pyright: ignore[reportUnusedFunction]
        """Whether the server answers, and with what."""
        return Health(
            status="ok",
            model=model.name,
            classes=len(model.classes),
            waiting=service.num_waiting,
            has_attention=model.has_attention,
            examples=model.num_examples,
            max_photos=service.limits.max_photos,
        )

    @app.get("/examples/{number}", include_in_schema=False)
    def example(number: int) -> Response:  # pyright: ignore[reportUnusedFunction]
        if not 0 <= number < model.num_examples:
            return JSONResponse({"detail": f"there is no example {number}"}, status_code=404)
        return Response(model.example(number), media_type="image/jpeg")

    @app.get("/classes", responses=refused)
    async def classes() -> Classes:  # pyright: ignore[reportUnusedFunction]
        """Names of the classes, in order of class number."""
        return Classes(classes=list(model.classes), threshold=model.threshold)

    @app.get("/metrics", responses={**refused, 200: {"content": {"text/plain": {}}}}, response_class=Response)
    async def metrics() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Counters for Prometheus."""
        service.metrics.waiting.set(service.num_waiting)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


STATIC = {"app.css": "text/css", "app.js": "text/javascript", "attention.js": "text/javascript"}
# The page loads nothing from elsewhere, and no page elsewhere may frame it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_COUNTED = {"/predict", "/health", "/classes", "/metrics", "/"}
_LOG = logging.getLogger(__name__)


def static_text(name: str) -> str:
    """A file of the page."""
    return (resources.files("fieldmark.serve") / "static" / name).read_text(encoding="utf-8")


def add_pages(app: Any, *, page: str = "index.html", files: dict[str, str] = STATIC) -> None:
    """Serve `page` at / and `files` (name -> media type) under /static."""
    from fastapi import Response
    from fastapi.responses import JSONResponse

    @app.get("/", include_in_schema=False)
    async def index() -> Response:  # pyright: ignore[reportUnusedFunction]
        return Response(static_text(page), media_type="text/html; charset=utf-8")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        if name not in files:
            return JSONResponse({"detail": "there is no such file"}, status_code=404)
        return Response(static_text(name), media_type=f"{files[name]}; charset=utf-8")


def observe(app: Any, metrics: ServerMetrics) -> None:
    """Count requests, set safe headers, and answer errors without what they hold inside."""
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
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Content-Security-Policy"] = _POLICY
        return response
