"""What `/metrics` tells, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector

from anyorder.serving.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Of one server.

    Args:
        engine: whose requests and forwards are counted.

    Attributes:
        requests: by path and HTTP status.
        tokens: read and written.
        first, whole: seconds to the first text of a stream, and of a request.
    """

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter("anyorder_requests", "Requests that were answered", ["path", "status"], registry=own)
        self.tokens = Counter("anyorder_tokens", "Tokens of texts", ["kind"], registry=own)
        self.first = Histogram("anyorder_first_text_seconds", "To a stream's first text", buckets=SECONDS, registry=own)
        self.whole = Histogram("anyorder_request_seconds", "Of a request", ["path"], buckets=SECONDS, registry=own)
        for name, text, value in (
            ("queued", "Requests that wait", lambda: engine.queued),
            ("at_work", "Requests at work", lambda: engine.at_work),
        ):
            Gauge(f"anyorder_requests_{name}", text, registry=own).set_function(value)
        self.registry.register(_Forwards(lambda: (engine.joiner.forwards, engine.joiner.rows)))

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)


class _Forwards(Collector):
    """Forwards of the decoder, and how many requests' rows were in them: their ratio is the batch size."""

    def __init__(self, counts: Callable[[], tuple[int, int]]):
        self._counts = counts

    def collect(self) -> list[CounterMetricFamily]:
        forwards, rows = self._counts()
        return [
            CounterMetricFamily("anyorder_forwards", "Forwards of the decoder", value=forwards),
            CounterMetricFamily("anyorder_forwards_requests", "Requests in these forwards", value=rows),
        ]
