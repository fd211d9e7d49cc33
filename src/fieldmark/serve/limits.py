"""What a request may cost and who may send it: one ASGI layer in front of the server and of the review page.

Sizes are checked while the body arrives: a header can lie, and a slow client must not hold memory for ever.
"""

import asyncio
import hmac
import ipaddress
import re
import socket
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fieldmark.errors import ConfigError

HTTP: dict[str, Any] = tomllib.loads((resources.files("fieldmark.serve") / "http.toml").read_text("utf-8"))
# The pages, their files and /health need no key.
_OPEN_PATHS = re.compile(r"/|/docs|/health|/(static|examples)/[^/]+")


@dataclass(frozen=True)
class Limits:
    """Holds what a request may cost."""

    max_body_bytes: int = 2**26
    max_held_bytes: int = 2**29  # of bodies at once, over all requests; beyond it clients are asked to retry
    max_photos: int = 64  # in a request
    max_pixels: int = 60_000_000  # of a photo, by its header
    max_queued: int = 256  # photos in hand, over all requests; beyond it clients are asked to retry
    max_batch: int = 16  # photos in one pass of the model
    body_seconds: float = 30.0  # for a body to arrive
    answer_seconds: float = 30.0  # to answer once the body is there, and for the client to read it


@dataclass(frozen=True)
class Access:
    """Says who may send requests."""

    hosts: tuple[str, ...] = ()  # names of the server besides those of this machine and all addresses in numbers
    api_key: str | None = None  # expected in the header X-API-Key or as a bearer token; None lets everybody in
    cors_origins: tuple[str, ...] = ()  # sites whose pages may ask, such as "https://birds.example"; "*" is all

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("the API key is empty: give one that cannot be guessed, or leave --api-key out")
        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/?#\s]+", origin):
                raise ConfigError(f'an origin is like "https://birds.example" or "*"; got {origin!r}')

    def require_own_name(self, host: str, origin: str) -> None:
        """Refuse a Host that is not this server, and pages of other sites unless they were allowed."""
        own = {name.lower() for name in self.hosts}
        name = _host_name(host)
        # Another site that points its own name at this machine must not read answers (DNS rebinding). An address in
        # numbers always is this server: rebinding needs a name.
        if name not in own | {"localhost", socket.gethostname().lower()} and parse_address(name) is None:
            raise HTTPException(400, f"this server is not {host[:100]!r}; give it that name by --hostname at its start")
        sender = origin.lower().partition("://")[2]
        is_own = bool(sender) and (sender == host.lower() or _host_name(sender) in own)  # also behind a proxy
        if origin and not is_own and not {"*", origin} & set(self.cors_origins):
            raise HTTPException(403, f"pages of {origin[:100]!r} may not ask; start the server with --cors to let them")

    def require_key(self, path: str, headers: Headers) -> None:
        """Refuse a request without the key, except for open paths."""
        if self.api_key is None or _OPEN_PATHS.fullmatch(path):
            return
        bearer = headers.get("authorization", "")
        given = headers.get("x-api-key") or (bearer[7:] if bearer.lower().startswith("bearer ") else "")
        # A comparison that stops at the first wrong letter would show how many are right.
        if not hmac.compare_digest(given.encode("latin-1"), self.api_key.encode()):
            reason = "this server asks for a key: send it as X-API-Key"
            raise HTTPException(401, reason, {"www-authenticate": "Bearer"})


def _host_name(host: str) -> str:
    """The name in a Host header, without the port, in lower case; "" if it is none."""
    found = re.fullmatch(r"(?:\[([\da-f:.]+)\]|([\w.-]+))(?::\d+)?", host.lower(), re.ASCII)
    return (found[1] or found[2]) if found else ""


def parse_address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address in numbers; None for a name."""
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def busy(reason: str) -> HTTPException:
    """There is too much to do: the client should come back."""
    return HTTPException(503, reason, {"retry-after": "2"})


class RequestLimits:
    """Check who asks, read the whole body under the limits, and only then call the app behind."""

    def __init__(self, app: ASGIApp, *, limits: Limits, access: Access) -> None:
        self._app, self._limits, self._access, self._held_bytes = app, limits, access, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = self._guard(send)
        with suppress(ClientDisconnect):  # nobody is there to answer
            try:
                await self._serve(scope, receive, send)
            except HTTPException as error:  # the rest of the body is not read
                headers = {**(error.headers or {}), "connection": "close"}
                await JSONResponse({"detail": error.detail}, error.status_code, headers)(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        self._access.require_own_name(headers.get("host", ""), headers.get("origin", ""))
        self._access.require_key(scope["path"], headers)
        body = bytearray()
        try:
            await self._take_body(Request(scope, receive), body)
            whole = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

            async def replay() -> Message:
                return next(whole, None) or await receive()  # only a disconnect can follow

            await self._app(scope, replay, send)
        finally:
            self._held_bytes -= len(body)

    async def _take_body(self, request: Request, body: bytearray) -> None:
        """Fill `body`, whose bytes count as held from the moment they arrive."""
        limits, announced = self._limits, request.headers.get("content-length", "")
        too_large = f"the request is larger than {limits.max_body_bytes} bytes; send fewer or smaller photos"
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > limits.max_body_bytes):
            raise HTTPException(413, too_large)
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for part in request.stream():
                    if len(body) + len(part) > limits.max_body_bytes:
                        raise HTTPException(413, too_large)
                    if self._held_bytes + len(part) > limits.max_held_bytes:
                        raise busy("too many requests are arriving; send this one again later")
                    body += part
                    self._held_bytes += len(part)
        except TimeoutError:
            raise HTTPException(408, f"the request did not arrive within {limits.body_seconds:g} seconds") from None

    def _guard(self, send: Send) -> Send:
        """Put the safe headers on an answer, and give up on a client that does not read it.

        What the request of such a client holds would be held for ever.
        """

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HTTP["safe_headers"])
            try:
                async with asyncio.timeout(self._limits.answer_seconds):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None

        return guarded
