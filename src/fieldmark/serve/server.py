"""The server: photos in, named probabilities out, over HTTP, and a page for people; under uvicorn, or on Ray Serve.

Made for 127.0.0.1 and for standing behind a proxy. Every answer is the model's or a reason that the client can act on;
file names, paths and tracebacks stay here.
"""

import logging
import socket
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from prometheus_client import generate_latest
from starlette.datastructures import UploadFile

from fieldmark.errors import ResourceError, needs_extra
from fieldmark.runs.environment import package_versions
from fieldmark.serve.limits import HTTP, Access, Limits, RequestLimits, parse_address
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
    finish_app(app, {"/": "index.html", "/docs": "docs.html"}, service.metrics, limits=limits, access=access)
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
            parts = [(name, part, isinstance(part, UploadFile)) for name, part in form.multi_items()]
            odd = [name for name, _, is_file in parts if is_file != (name in _FIELDS)]
            photos = [await part.read() for name, part, _ in parts if isinstance(part, UploadFile) and name in _FIELDS]
    except Exception:  # whatever the parser meets in bytes of strangers
        raise HTTPException(400, f"the form cannot be read; {wanted}") from None
    if not photos:
        raise HTTPException(422, f"the form has no file in a field named {', '.join(_FIELDS[:6])}; {wanted}")
    if odd:  # its photo would be missing, and the answers of those after it would be taken for others'
        raise HTTPException(422, f"the field {odd[0][:100]!r} is no file, or a file in another field; {wanted}")
    return photos


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
    return Response(generate_latest(service.metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")


def finish_app(app: FastAPI, pages: dict[str, str], metrics: ServerMetrics, *, limits: Limits, access: Access) -> None:
    """Serve HTML files by path, with all that they load; count requests, refuse some, and answer errors in a word."""
    names = pages | {f"/static/{file.name}": file.name for file in _STATIC.iterdir()}
    for path, name in names.items():
        kind = f"{_MEDIA_TYPES[Path(name).suffix]}; charset=utf-8"
        answer: Any = Response((_STATIC / name).read_bytes(), media_type=kind)
        app.add_route(path, answer, methods=["GET"], include_in_schema=False)

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
    app.add_middleware(RequestLimits, limits=limits, access=access)
    if access.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=access.cors_origins, **HTTP["cors"])


def run_server(app: FastAPI, *, host: str, port: int, drain_seconds: int, max_connections: int) -> None:
    """Serve until SIGINT or SIGTERM, then answer what is in hand; connections beyond the limit get 503 from uvicorn."""
    import uvicorn

    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="error",  # its warnings are a line for each malformed request: strangers could fill the log
        server_header=False,
        limit_concurrency=max_connections,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=drain_seconds,
        # Endless headers: h11 bounds them, and is there always; httptools would hold them all.
        http="h11",
        h11_max_incomplete_event_size=32 * 1024,
        ws="none",
    )
    with listen(host, port) as listener:
        uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port that is taken is one clear message."""
    address = parse_address(host)
    family = socket.AF_INET6 if address and address.version == 6 else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror or error).partition(" (")[0]
        raise ResourceError(f"{host}:{port} cannot be listened on: {reason}. Give another --host or --port") from None


def is_local(host: str) -> bool:
    """Whether only this machine can reach the address; if not, a server without a key deserves a warning."""
    address = parse_address(host)
    return address.is_loopback if address else host == "localhost"


def make_application(
    model: str | Path,
    *,
    replicas: int = 1,
    cpus: int = 1,
    gpus: int = 0,
    limits: Limits | None = None,
    access: Access | None = None,
) -> Any:
    """The server of a model as what Ray Serve runs: `serve run MODULE:NAME`, or `ray.serve.run`, on any cluster.

    Each of the replicas has cores, GPUs, a model, batches and limits of its own, and restarts by itself when it dies.
    It takes as many requests at once as it holds photos: beyond that the app refuses by itself, with Retry-After. At
    the end those in hand are answered. The model's folder must be at the same path on all machines.
    """
    with needs_extra("ray[serve]", "ray"):
        from ray import serve
    limits, access, path = limits or Limits(), access or Access(), Path(model).absolute()
    open_app(path, cpus, limits=limits, access=access)  # what is wrong with the model is reported here

    def build() -> FastAPI:
        import torch

        torch.set_num_threads(cpus)
        return open_app(path, cpus, limits=limits, access=access)

    deploy: Any = serve.deployment(
        name="fieldmark",
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=limits.max_queued,
        max_queued_requests=limits.max_queued,
        graceful_shutdown_timeout_s=limits.answer_seconds + 1,
        graceful_shutdown_wait_loop_s=0.2,
    )
    return deploy(serve.ingress(build)()).bind()
