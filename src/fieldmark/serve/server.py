"""An app under uvicorn, from start to drain, and as what Ray Serve runs."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fieldmark.errors import ResourceError, needs_extra
from fieldmark.serve.app import open_app
from fieldmark.serve.limits import Access, Limits, parse_address

if TYPE_CHECKING:
    from fastapi import FastAPI


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
