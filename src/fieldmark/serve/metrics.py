"""What the server counts, in Prometheus' form."""

from __future__ import annotations

from typing import Any


class ServerMetrics:
    """Counters of one server, in a registry of their own, so that two apps in a process do not mix."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        self.requests = Counter(
            "fieldmark_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "fieldmark_request_seconds", "Time from body to answer.", ["path"], registry=self.registry
        )
        self.photos = Counter("fieldmark_photos", "Photos by outcome.", ["outcome"], registry=self.registry)
        self.batch_size = Histogram(
            "fieldmark_batch_photos",
            "Photos answered in one pass of the model.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self.registry,
        )
        self.waiting = Gauge("fieldmark_waiting_photos", "Photos that wait for the model.", registry=self.registry)

    def text(self) -> bytes:
        """The exposition format."""
        from prometheus_client import generate_latest

        answer: Any = generate_latest(self.registry)
        return answer
