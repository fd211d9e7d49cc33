"""What a request may cost and who may send it: one ASGI layer in front of the server and of the review page.

Sizes are checked while the body arrives: a header can lie, and a slow client must not hold memory for ever.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from fieldmark.errors import ConfigError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
Headers = dict[bytes, bytes]


@dataclass(frozen=True)
class Limits:
    """What a request may cost.

    Attributes:
        max_body_bytes: Largest request body.
        max_held_bytes: Most bytes of bodies held at once, over all requests; beyond it clients are asked to retry.
        max_photos: Most photos in a request.
        max_pixels: Most pixels of a photo, by its header.
        max_queued: Most photos that wait for the model, over all requests; beyond it clients are asked to retry.
        body_seconds: Longest time for a body to arrive.
        answer_seconds: Longest time for a request to be answered once its body is there, and for the client to read it.
        retry_seconds: What Retry-After says when the queue is full.
    """

    max_body_bytes: int
    max_held_bytes: int
    max_photos: int
    max_pixels: int
    max_queued: int
    body_seconds: float
    answer_seconds: float
    retry_seconds: int


@dataclass(frozen=True)
class Access:
    """Who may send requests.

    Attributes:
        hosts: Names that the server is addressed by, besides those of this machine and all addresses in numbers.
        api_key: Expected in the header X-API-Key or as a bearer token; None lets everybody in.
        cors_origins: Other sites whose pages may ask, such as "https://birds.example"; "*" is all of them.
        open_paths: Paths that need no key.
    """

    hosts: tuple[str, ...] = ()
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    open_paths: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("the API key is empty: give one that cannot be guessed, or leave --api-key out")
        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/?#\s]+", origin):
                raise ConfigError(f'an origin is like "https://birds.example" or "*"; got {origin!r}')

    def knows_host(self, host: str) -> bool:
        """Whether a Host header names this server. An address in numbers always does: rebinding needs a name."""
        name = _host_name(host)
        known = {"localhost", socket.gethostname().lower(), *(own.lower() for own in self.hosts)}
        return name in known or _is_address(name)

    def takes_origin(self, origin: str, host: str) -> bool:
        """Whether a page of this origin may ask: the server's own, also behind a proxy, or one that was allowed."""
        netloc = origin.lower().partition("://")[2]
        own = netloc == host.lower() or _host_name(netloc) in {name.lower() for name in self.hosts}
        return (own and bool(netloc)) or self.shares_with(origin)

    def shares_with(self, origin: str) -> bool:
        """Whether a page of another site may read the answers."""
        return "*" in self.cors_origins or origin in self.cors_origins


def _host_name(host: str) -> str:
    """The name in a Host header, without the port, in lower case."""
    found = re.fullmatch(r"(?:\[([\da-f:.]+)\]|([\w.-]+))(?::\d+)?", host.lower(), re.ASCII)
    return (found[1] or found[2]) if found else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class _RefusedError(Exception):
    """The request is refused; the client gets a status, a reason and headers."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers or {}


class _ClientLeftError(Exception):
    """The client closed the connection before its body was there."""


class _UnreadError(Exception):
    """The client does not read its answer."""


class RequestLimits:
    """Check who asks, read the whole body under the limits, and only then call the app behind."""

    def __init__(self, app: App, *, limits: Limits, access: Access) -> None:
        self._app = app
        self._limits = limits
        self._access = access
        self._held_bytes = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: Headers = dict(scope["headers"])
        origin = headers.get(b"origin", b"").decode("latin-1")
        send = _with_headers(send, origin if self._access.shares_with(origin) else "")
        send = _within(send, self._limits.answer_seconds)
        parts: list[bytes] = []
        try:
            self._check_access(scope, headers, origin)
            if scope["method"] == "OPTIONS" and origin and b"access-control-request-method" in headers:
                await _answer_preflight(send)
                return
            self._check_key(scope["path"], headers)
            await self._take_body(headers, receive, parts)
            await self._app(scope, _replay(b"".join(parts), receive), send)
        except _RefusedError as error:
            await _refuse(send, error)
        except (_ClientLeftError, _UnreadError):
            return  # nobody is there to answer
        finally:
            self._held_bytes -= sum(map(len, parts))

    def _check_access(self, scope: MutableMapping[str, Any], headers: Headers, origin: str) -> None:
        # Another site that points its own name at this machine must not read answers (DNS rebinding).
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._access.knows_host(host):
            raise _RefusedError(
                400, f"this server is not {host[:100]!r}; start it with --hostname to give it that name"
            )
        if origin and not self._access.takes_origin(origin, host):
            raise _RefusedError(403, f"pages of {origin[:100]!r} may not ask; start the server with --cors to let them")

    def _check_key(self, path: str, headers: Headers) -> None:
        key = self._access.api_key
        if key is None or path in self._access.open_paths:
            return
        bearer = headers.get(b"authorization", b"")
        given = headers.get(b"x-api-key") or (bearer[7:] if bearer.lower().startswith(b"bearer ") else b"")
        # A comparison that stops at the first wrong letter would show how many are right.
        if not hmac.compare_digest(given, key.encode()):
            reason = "this server asks for a key: send it as X-API-Key"
            raise _RefusedError(401, reason, {"www-authenticate": "Bearer"})

    async def _take_body(self, headers: Headers, receive: Receive, parts: list[bytes]) -> None:
        """Fill `parts`, which count as held from the moment they arrive."""
        limits = self._limits
        reason = f"the request is larger than {limits.max_body_bytes} bytes; send fewer or smaller photos"
        announced = headers.get(b"content-length", b"")
        if announced.isdigit() and (len(announced) > 18 or int(announced) > limits.max_body_bytes):
            raise _RefusedError(413, reason)
        total = 0
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientLeftError
                    part = message.get("body", b"")
                    total += len(part)
                    if total > limits.max_body_bytes:
                        raise _RefusedError(413, reason)
                    if self._held_bytes + len(part) > limits.max_held_bytes:
                        wait = {"retry-after": str(limits.retry_seconds)}
                        raise _RefusedError(503, "too many requests are arriving; send this one again later", wait)
                    parts.append(part)
                    self._held_bytes += len(part)
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            raise _RefusedError(408, f"the request did not arrive within {limits.body_seconds:g} seconds") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    is_sent = False

    async def replay() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()  # only a disconnect can follow
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _within(send: Send, seconds: float) -> Send:
    """Give up on a client that asks and does not read: what its request holds would be held for ever."""

    async def sending(message: Message) -> None:
        try:
            async with asyncio.timeout(seconds):
                await send(message)
        except TimeoutError:
            raise _UnreadError from None

    return sending


# The pages load nothing from elsewhere, and no page elsewhere may frame them or show their photos.
_SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


def _with_headers(send: Send, origin: str) -> Send:
    """Put the safe headers on every answer; `origin` is another site that may read it, or ""."""
    fields = dict(_SAFE_HEADERS)
    if origin:
        fields |= {"access-control-allow-origin": origin, "vary": "Origin"}
        fields |= {"access-control-expose-headers": "Retry-After"}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *raw]}
        await send(message)

    return sending


async def _answer_preflight(send: Send) -> None:
    """What a browser asks before it lets a page of another site send a request."""
    fields = {
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": "Authorization, Content-Type, X-API-Key",
        "access-control-max-age": "600",
    }
    raw = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": 204, "headers": raw})
    await send({"type": "http.response.body", "body": b""})


async def _refuse(send: Send, error: _RefusedError) -> None:
    """Answer with a JSON reason, in the app's own form, and close: the rest of the body is not read."""
    body = json.dumps({"detail": error.reason}).encode()
    fields = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **error.headers,
    }
    raw = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
