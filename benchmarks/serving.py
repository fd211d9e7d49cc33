"""Our server beside a plain FastAPI + torch endpoint without batching: photos per second and latency under load.

    python -m benchmarks.serving [--quick] [--json FILE]

Both run in processes of their own, one at a time in each round, with the same model (EfficientNet-Lite0 at 224 pixels,
random weights: speed only), the same decoding and the same photos. Each client sends one photo, waits for the answer,
and sends the next.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

import httpx
import numpy as np

from benchmarks.record import PHOTOS, Findings, Ratio, load_average, parse_arguments, report

CLIENTS = (1, 16, 64)
KINDS = ("ours", "plain")


def make_photos(count: int) -> list[bytes]:
    """JPEG photos of birds100, or noise where it is absent."""
    files = sorted((PHOTOS / "test").glob("*.jpg"))[:count]
    if files:
        return [file.read_bytes() for file in files]
    from PIL import Image

    rng = np.random.default_rng(0)
    photos: list[bytes] = []
    for _ in range(count):
        buffer = io.BytesIO()
        small = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8))
        small.resize((500, 375)).save(buffer, "JPEG", quality=90)
        photos.append(buffer.getvalue())
    return photos


class Model:
    """What both servers answer with."""

    classes = tuple(f"class {number}" for number in range(1000))
    threshold = 0.0
    fallback = None
    has_attention = False
    examples = ()
    name, accuracy, is_calibrated = "lite0", None, False

    def __init__(self) -> None:
        import timm
        import torch

        from fieldmark.augment.reference import EvalSpec
        from fieldmark.models.weights import fuse_batch_norm

        torch.set_num_threads(os.cpu_count() or 1)
        model = timm.create_model("tf_efficientnet_lite0").eval()
        self._model = fuse_batch_norm(model)[0].to(memory_format=torch.channels_last)
        self._spec = EvalSpec("weights", 224, 0.875, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def attention(self, picture: Any, class_number: int) -> Any:
        raise NotImplementedError

    def prepare(self, data: bytes, *, max_pixels: int) -> Any:
        from fieldmark.augment.reference import eval_reference
        from fieldmark.data.decode import DecodeSpec
        from fieldmark.serve.service import Prepared

        photo = DecodeSpec((255, 255, 255), max_pixels).read(data)
        return Prepared(eval_reference(photo, self._spec).numpy(), (0.0, 0.0, 1.0, 1.0))

    def probabilities(self, images: Any) -> Any:
        import torch

        inputs = torch.from_numpy(images).to(memory_format=torch.channels_last)
        with torch.inference_mode():
            return self._model(inputs).softmax(dim=1).numpy()


def ours() -> Any:
    """Our app, nothing limited that the load would reach."""
    from fieldmark.serve.limits import Access, Limits
    from fieldmark.serve.server import create_app

    limits = Limits(
        max_body_bytes=2**26,
        max_held_bytes=2**30, max_photos=64, max_pixels=10**8, max_queued=1024, body_seconds=60, answer_seconds=60,
        max_batch=16,
    )  # fmt: skip
    threads = os.cpu_count() or 1
    model: Any = Model()
    return create_app(model, limits=limits, access=Access(), decode_threads=threads)


def plain() -> Any:
    """What a tutorial shows: decode and predict in the handler, on FastAPI's thread pool."""
    from fastapi import FastAPI, File

    app, model = FastAPI(), Model()

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/predict")
    def predict(photos: bytes = File()) -> dict[str, float]:
        row = model.probabilities(model.prepare(photos, max_pixels=10**8).picture[None])[0]
        best = np.argsort(-row)[:5]
        return {model.classes[number]: float(row[number]) for number in best}

    return app


@contextlib.contextmanager
def running(kind: str) -> Any:
    """A server in a process of its own: its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.serving", "--serve", kind, "--port", str(port)])
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{url}/health", timeout=2)
                break
            if process.poll() is not None:
                raise SystemExit(f"the {kind} server ended with {process.returncode}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


async def load(url: str, photos: list[bytes], *, clients: int, seconds: float) -> tuple[float, list[float]]:
    """Photos per second and the latency of each answer, in seconds."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def client(number: int, http: httpx.AsyncClient) -> None:
        turn = number
        while time.perf_counter() < end:
            turn += 1
            start = time.perf_counter()
            answer = await http.post(f"{url}/predict", files={"photos": ("a.jpg", photos[turn % len(photos)])})
            answer.raise_for_status()
            latencies.append(time.perf_counter() - start)

    limits = httpx.Limits(max_connections=clients)
    start = time.perf_counter()
    async with httpx.AsyncClient(timeout=60, limits=limits) as http:
        await asyncio.gather(*(client(number, http) for number in range(clients)))
    return len(latencies) / (time.perf_counter() - start), latencies


def measure(*, is_quick: bool) -> Findings:
    """Rates and latencies for each kind and number of clients; each kind is started anew in each round."""
    rounds, seconds = (2, 6.0) if is_quick else (5, 15.0)
    photos = make_photos(64)
    rates: dict[str, list[float]] = {}
    latencies: dict[str, list[float]] = {}
    for turn in range(rounds):
        for kind in KINDS if turn % 2 == 0 else KINDS[::-1]:
            with running(kind) as url:
                asyncio.run(load(url, photos, clients=4, seconds=2))
                for clients in CLIENTS:
                    rate, times = asyncio.run(load(url, photos, clients=clients, seconds=seconds))
                    rates.setdefault(f"{kind}, {clients} clients", []).append(rate)
                    latencies.setdefault(f"{kind}, {clients} clients", []).extend(times)
    findings = Findings(rounds={"serving": rounds})
    for case, seen in rates.items():
        findings.add(case, statistics.median(seen), "photos per second of the clock")
        findings.spread[case] = (min(seen), max(seen))
        for share in (50, 95, 99):
            findings.add(f"{case}, p{share}", 1000 * float(np.percentile(latencies[case], share)), "ms")
    most = max(CLIENTS)
    findings.ratios = {
        f"throughput, {most} clients": Ratio(f"ours, {most} clients", f"plain, {most} clients", 1.0),
        f"p95 latency, {most} clients, plain / ours": Ratio(
            f"plain, {most} clients, p95", f"ours, {most} clients, p95", 1.0
        ),
        "median latency, 1 client, plain / ours": Ratio("plain, 1 clients, p50", "ours, 1 clients, p50", 0.8),
    }
    findings.notes = [
        "EfficientNet-Lite0 at 224 pixels, random weights; clients and server share the processor's cores",
        "plain is FastAPI's thread pool with one forward pass for each request",
    ]
    return findings


def serve(kind: str, port: int) -> None:
    """Run one of the servers in this process."""
    import uvicorn

    uvicorn.run(ours() if kind == "ours" else plain(), host="127.0.0.1", port=port, log_level="error")


def main() -> None:
    """Measure and report."""
    if "--serve" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--serve", choices=KINDS)
        parser.add_argument("--port", type=int)
        chosen = parser.parse_args()
        serve(chosen.serve, chosen.port)
        return
    load_before = load_average()
    arguments = parse_arguments(__doc__ or "")
    findings = measure(is_quick=arguments.quick)
    report("serving", findings, is_quick=arguments.quick, json_file=arguments.json, load_before=load_before)


if __name__ == "__main__":
    main()
