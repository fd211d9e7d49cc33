"""What a request may cost, and the ASGI layer that refuses more before it is read.

Sizes are checked while the body arrives: a header can lie, and a slow client must not hold a place for ever.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """What is refused.

    Attributes:
        max_body_bytes: Largest request body.
        max_held_bytes: Most bytes of bodies held at once, over all requests; beyond it they are told to come back.
        max_photos: Most photos in a request.
        max_pixels: Most pixels of a photo, by its header.
        max_queued: Most photos that wait for the model, over all requests; beyond it requests are told to come back.
        body_seconds: Longest time for a body to arrive.
        answer_seconds: Longest time for a request to be answered once its body is there.
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


class _TooLargeError(Exception):
    """The body is over the limit."""


class _TooSlowError(Exception):
    """The body took too long to arrive."""


class _ClientLeftError(Exception):
    """The client closed the connection before its body was there."""


class _TooManyError(Exception):
    """The bodies of all requests together are over the limit."""


class Gate:
    """Reads the whole body under the limits, checks the API key, and only then calls the app.

    Args:
        app: The app behind it.
        limits: What is refused.
        api_key: Expected in the header X-API-Key or as a bearer token; None lets everybody in.
        open_paths: Paths that need no key.
    """

    def __init__(self, app: App, *, limits: Limits, api_key: str | None, open_paths: frozenset[str]) -> None:
        self._app = app
        self._limits = limits
        self._api_key = api_key
        self._open_paths = open_paths
        self._held_bytes = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if self._api_key is not None and scope["path"] not in self._open_paths and not self._has_key(headers):
            await refuse(send, 401, "this server asks for a key: send it as X-API-Key", {"www-authenticate": "Bearer"})
            return
        parts: list[bytes] = []
        try:
            await self._take_body(headers, receive, parts)
            await self._app(scope, _replay(b"".join(parts), receive), send)
        except _TooLargeError:
            most = self._limits.max_body_bytes
            await refuse(send, 413, f"the request is larger than {most} bytes; send fewer or smaller photos")
        except _TooSlowError:
            await refuse(send, 408, f"the request did not arrive within {self._limits.body_seconds:g} seconds")
        except _TooManyError:
            wait = {"retry-after": str(self._limits.retry_seconds)}
            await refuse(send, 503, "too many requests are arriving; send this one again later", wait)
        except _ClientLeftError:
            return  # nobody is there to answer
        finally:
            self._held_bytes -= sum(map(len, parts))

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        assert self._api_key is not None
        bearer = headers.get(b"authorization", b"")
        given = headers.get(b"x-api-key") or (bearer[7:] if bearer.lower().startswith(b"bearer ") else b"")
        # A comparison that stops at the first wrong letter would tell how many are right.
        return hmac.compare_digest(given, self._api_key.encode())

    async def _take_body(self, headers: dict[bytes, bytes], receive: Receive, parts: list[bytes]) -> None:
        """Fill `parts`, which count as held from the moment they arrive."""
        announced = headers.get(b"content-length", b"")
        if announced.isdigit() and (len(announced) > 18 or int(announced) > self._limits.max_body_bytes):
            raise _TooLargeError
        total = 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientLeftError
                    part = message.get("body", b"")
                    total += len(part)
                    if total > self._limits.max_body_bytes:
                        raise _TooLargeError
                    if self._held_bytes + len(part) > self._limits.max_held_bytes:
                        raise _TooManyError
                    parts.append(part)
                    self._held_bytes += len(part)
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            raise _TooSlowError from None


def _replay(body: bytes, receive: Receive) -> Receive:
    is_sent = False

    async def replay() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()  # only a disconnect can follow
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def refuse(send: Send, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
    """Answer with a JSON reason, in the app's own form, and close: the rest of the body is not read."""
    body = json.dumps({"detail": reason}).encode()
    fields = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **(headers or {}),
    }
    raw = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
