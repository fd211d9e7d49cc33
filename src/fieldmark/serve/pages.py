"""What every app of this package does alike: its page, its headers, its errors, its counting."""

# Without `from __future__ import annotations`: FastAPI reads the annotations of functions that are defined in others.

import logging
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from fieldmark.serve.metrics import ServerMetrics

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
