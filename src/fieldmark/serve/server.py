"""An app under uvicorn, from start to drain."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

from fieldmark.errors import MissingExtraError, ResourceError


def run_server(app: Any, *, host: str, port: int, drain_seconds: int, max_connections: int) -> None:
    """Serve until SIGINT or SIGTERM; then take no more requests, answer those in hand, and return.

    Args:
        app: An ASGI app.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        drain_seconds: Longest time that requests in hand may take after the signal.
        max_connections: More connections at once are answered with 503 by uvicorn itself.

    Raises:
        MissingExtraError: uvicorn is not installed.
        ResourceError: The address cannot be listened on.
    """
    try:
        import uvicorn
    except ImportError:
        raise MissingExtraError("uvicorn", "serve") from None
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        server_header=False,
        limit_concurrency=max_connections,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=drain_seconds,
        h11_max_incomplete_event_size=32 * 1024,  # headers; more are refused with 400
    )
    listener = listen(host, port)
    with listener:
        uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port that is taken is one clear message."""
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        family = socket.AF_INET  # a name
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ResourceError(
            f"{host}:{port} cannot be listened on: {error.strerror or error}. Give another --host or --port"
        ) from None
    listener.set_inheritable(True)
    return listener


def is_local(host: str) -> bool:
    """Whether only this machine can reach the address; if not, a server without a key deserves a warning."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
