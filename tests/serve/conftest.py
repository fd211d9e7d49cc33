"""A model for the server that needs no weights: it answers by the photo's mean color."""

from __future__ import annotations

import asyncio
import io
import threading
from contextlib import asynccontextmanager

import httpx
import numpy as np
import pytest
from PIL import Image

from fieldmark.data.decode import DecodeSpec
from fieldmark.serve.limits import Access, Limits
from fieldmark.serve.server import create_app
from fieldmark.serve.service import Accuracy, Prepared

LIMITS = {
    "max_body_bytes": 200_000,
    "max_held_bytes": 1_000_000,
    "max_photos": 8,
    "max_pixels": 1_000_000,
    "max_queued": 16,
    "body_seconds": 5.0,
    "answer_seconds": 5.0,
    "max_batch": 4,
}


class ColorModel:
    name = "colors"
    accuracy = Accuracy(value=0.9, low=0.85, high=0.94)
    is_calibrated = False
    classes = ("red", "green", "blue <b>")
    threshold = 0.5
    fallback = None
    has_attention = True

    def __init__(self):
        self.examples = [make_photo((255, 0, 0)), make_photo((0, 255, 0))]
        self.batches = []
        self.gate = threading.Event()
        self.gate.set()

    def prepare(self, data, *, max_pixels):
        photo = DecodeSpec((255, 255, 255), max_pixels).read(data)
        means = photo.reshape(-1, 3).mean(axis=0) / 255
        return Prepared(np.broadcast_to(means[:, None, None], (3, 2, 2)).astype(np.float32), (0.25, 0.0, 0.5, 1.0))

    def probabilities(self, images):
        self.gate.wait(10)
        self.batches.append(len(images))
        means = images.mean(axis=(2, 3)) + 1e-3
        return (means / means.sum(axis=1, keepdims=True)).astype(np.float32)

    def attention(self, picture, class_number):
        return np.full((2, 2), class_number / 2, np.float32)


def make_photo(color=(255, 0, 0), size=(40, 30), kind="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


def upload(*contents):
    return [("photos", (f"photo-{number}.jpg", content, "image/jpeg")) for number, content in enumerate(contents)]


def make_app(model, *, api_key=None, cors=(), **limits):
    return create_app(
        model,
        limits=Limits(**{**LIMITS, **limits}),
        access=Access(("test", "testserver"), api_key, cors),
        decode_threads=2,
    )


@asynccontextmanager
async def client_of(app):
    """An HTTP client in the same process, with the app's start and end around it."""
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://test") as it:
        yield it


@pytest.fixture
def model():
    return ColorModel()


def ask(app, *calls):
    """Run coroutines of a client, one after another, and give their results."""

    async def run():
        async with client_of(app) as client:
            return [await call(client) for call in calls]

    return asyncio.run(run())
