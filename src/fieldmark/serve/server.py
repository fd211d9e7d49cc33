"""An app under uvicorn, from start to drain, and as replicas on a Ray cluster."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fieldmark.errors import ResourceError, needs_extra
from fieldmark.runs.environment import count_slots, open_cluster
from fieldmark.runs.train import stop_requests
from fieldmark.serve.limits import parse_address

if TYPE_CHECKING:
    from fastapi import FastAPI

OpenApp = Callable[[int], "FastAPI"]


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
    listener = socket.socket(socket.AF_INET6 if address and address.version == 6 else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ResourceError(
            f"{host}:{port} cannot be listened on: {error.strerror or error}. Give another --host or --port"
        ) from None
    return listener


def is_local(host: str) -> bool:
    """Whether only this machine can reach the address; if not, a server without a key deserves a warning."""
    address = parse_address(host)
    return address.is_loopback if address else host == "localhost"


NAME = "fieldmark"
_LOOK_SECONDS = 0.2


def make_application(
    open_app: OpenApp, *, replicas: int, cpus: int, gpus: int, max_requests: int, drain_seconds: int
) -> Any:
    """The app as what `ray.serve.run` takes, for a cluster that has Serve already.

    Each replica has cores, GPUs, a model, batches and limits of its own, and restarts by itself when it dies. There,
    `open_app` (importable, or a `functools.partial`) is called with the number of its cores. A replica takes
    `max_requests` at once, and as many wait in front of all: no fewer than the photos that it holds, as the app refuses
    by itself, with Retry-After. At the end those in hand may take `drain_seconds`.
    """
    serve = _import_serve()

    def build() -> FastAPI:
        import torch

        torch.set_num_threads(cpus)
        return open_app(cpus)

    return serve.deployment(
        serve.ingress(build)(),
        name=NAME,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=max_requests,
        max_queued_requests=max_requests,
        graceful_shutdown_timeout_s=drain_seconds,
        graceful_shutdown_wait_loop_s=_LOOK_SECONDS,
    ).bind()


def run_on_ray(
    open_app: OpenApp,
    *,
    address: str,
    replicas: int | None,
    host: str,
    port: int,
    max_requests: int,
    drain_seconds: int,
    on_ready: Callable[[str], None],
) -> None:
    """Serve from a cluster until SIGINT or SIGTERM; then answer what is in hand, and return.

    Every machine of the cluster with a replica listens, and hands requests to all replicas, which share the cores
    evenly. The arguments are those of `open_cluster`, `make_application` and `run_server`; without `replicas` there is
    one for each GPU, or else for each machine. `on_ready` is told what is running when requests are answered.
    """
    serve = _import_serve()
    with listen(host, port) as listener:  # a port that is taken is one clear message
        port = listener.getsockname()[1]
    ray, owns = open_cluster(address)
    try:
        with _own_serve(serve), stop_requests() as stop:
            count = replicas or count_replicas(ray)
            cpus, gpus = share_cores(ray, count)
            application = make_application(
                open_app, replicas=count, cpus=cpus, gpus=gpus, max_requests=max_requests, drain_seconds=drain_seconds
            )
            quiet = {"log_level": "ERROR", "enable_access_log": False}
            serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
            try:
                serve.run(application, name=NAME, route_prefix="/", logging_config=quiet)
            except RuntimeError as error:
                raise ResourceError(f"the replicas do not start: {_reason(serve, error)}") from None
            on_ready(f"{count} x {cpus} CPUs and {gpus} GPUs at http://{host}:{port}")
            while not stop:
                time.sleep(_LOOK_SECONDS)
            _drain(serve, drain_seconds)
    finally:
        if owns:
            ray.shutdown()


def _import_serve() -> Any:
    with needs_extra("ray[serve]", "ray"):
        from ray import serve
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    return serve


@contextmanager
def _own_serve(serve: Any) -> Generator[None]:
    """Ray Serve, from here to the end of the block."""
    status = serve.status()
    if status.applications or status.proxies:
        raise ResourceError(
            "Ray Serve runs on this cluster already, with an address of its own. Stop it (`serve shutdown`), or add "
            "the app to it: ray.serve.run(fieldmark.serve.server.make_application(...))"
        )
    try:
        yield
    finally:
        serve.shutdown()


def _reason(serve: Any, error: Exception) -> str:
    """Return what a replica died of: the last line of the traceback that Ray keeps."""
    application = serve.status().applications.get(NAME)
    deployment = application.deployments.get(NAME) if application else None
    lines = deployment.message.split("\n") if deployment else []
    return next((line.strip() for line in reversed(lines) if line.strip()), str(error))


def _drain(serve: Any, seconds: float) -> None:
    """Answer what is in hand, which a shutdown alone would cut off."""
    end = time.monotonic() + seconds
    while True:
        try:
            serve.delete(NAME)
            return
        except TimeoutError:  # Ray waits for a minute
            if time.monotonic() >= end:
                return


def count_replicas(ray: Any) -> int:
    """Replicas that suit a cluster: one for each GPU, or else for each machine with cores."""
    gpus = int(ray.cluster_resources().get("GPU", 0.0))
    machines = sum(node["Alive"] and node["Resources"].get("CPU", 0.0) >= 1 for node in ray.nodes())
    return gpus or machines or 1


def share_cores(ray: Any, count: int) -> tuple[int, int]:
    """Most cores, and GPUs, that each of so many replicas can have; ResourceError where the cluster has no room."""
    total = ray.cluster_resources()
    gpus = 1 if total.get("GPU") else 0
    for cpus in range(int(total.get("CPU", 0.0)) // count, 0, -1):
        if count_slots(ray, {"CPU": float(cpus), "GPU": float(gpus)}) >= count:
            return cpus, gpus
    raise ResourceError(
        f"{count} replicas need a CPU each and {gpus} GPUs each, and the Ray cluster has {total.get('CPU', 0):g} CPUs "
        f"and {total.get('GPU', 0):g} GPUs. Give fewer --replicas, or add machines"
    )
