"""What /metrics tells Prometheus: requests, tokens, and how long clients waited for them."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from halfweight.engine.streams import Piece

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self._registry, "namespace": "halfweight"}
        self._running = Gauge("requests_running", "Requests running or waiting.", **made)
        self._finished = Counter("requests", "Requests that ended.", ["finish_reason"], **made)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts.", **made)
        self._cached = Counter("cached_prompt_tokens", "Of them, not read again.", **made)
        self._generated = Counter("generated_tokens", "New tokens.", **made)
        self._first = Histogram(
            "first_token_seconds", "From request to first token.", buckets=SECONDS, **made
        )
        self._between = Histogram(
            "between_tokens_seconds", "From one piece to the next.", buckets=SECONDS, **made
        )

    def watch(self, prompt_tokens: int) -> Watch:
        """Count one request from now on."""
        self._prompt.inc(prompt_tokens)
        return Watch(self)

    def page(self, num_running: int) -> tuple[bytes, int, None, str]:
        """The body of /metrics with status, headers and type, as a Response takes them."""
        self._running.set(num_running)
        return generate_latest(self._registry), 200, None, CONTENT_TYPE_LATEST

    def count_left(self) -> None:
        """A request that ended without a reason: its client went away, or the engine failed."""
        self._finished.labels("cancelled").inc()

    def count(self, piece: Piece, seconds: float, *, is_first: bool) -> None:
        """One piece of a request, `seconds` after what came before it."""
        (self._first if is_first else self._between).observe(seconds)
        self._generated.inc(len(piece.tokens))
        if is_first:
            self._cached.inc(piece.num_shared_tokens)
        if piece.finish_reason is not None:
            self._finished.labels(piece.finish_reason).inc()


class Watch:
    """The clock of one request."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._is_first, self._has_ended = metrics, True, False
        self._last = time.perf_counter()

    def see(self, piece: Piece) -> None:
        """A piece has come."""
        now = time.perf_counter()
        self._metrics.count(piece, now - self._last, is_first=self._is_first)
        self._last, self._is_first = now, False
        self._has_ended = piece.finish_reason is not None

    def end(self) -> None:
        """No more pieces will come."""
        if not self._has_ended:
            self._metrics.count_left()
