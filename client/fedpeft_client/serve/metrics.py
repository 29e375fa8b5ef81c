"""Counters and histograms in Prometheus' text form."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedpeft.serving.backend import Backend

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """Cumulative counts of seconds."""

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self._bounds, self._counts, self._sum, self._number = tuple(bounds), [0] * len(bounds), 0.0, 0

    def add(self, seconds: float) -> None:
        """Count one."""
        self._sum, self._number = self._sum + seconds, self._number + 1
        for place, bound in enumerate(self._bounds):
            self._counts[place] += seconds <= bound

    def lines(self, name: str) -> list[str]:
        """Its series."""
        rows = [f'{name}_bucket{{le="{bound:g}"}} {count}' for bound, count in zip(self._bounds, self._counts, strict=True)]
        return [*rows, f'{name}_bucket{{le="+Inf"}} {self._number}', f"{name}_sum {self._sum:.6f}", f"{name}_count {self._number}"]


@dataclass
class Metrics:
    """What the HTTP side counts; no text of a request, key or caller is in it."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    first_token: Histogram = field(default_factory=Histogram)
    whole: Histogram = field(default_factory=Histogram)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a response."""
        with self._lock:
            self.requests[(path, status)] += 1
            self.whole.add(seconds)

    def began(self, seconds: float) -> None:
        """Count a first token."""
        with self._lock:
            self.first_token.add(seconds)

    def text(self, backend: Backend) -> str:
        """All series."""
        with self._lock:
            lines = _family("fedpeft_requests_total", "counter", "Responses by route and status.")
            lines += [
                f'fedpeft_requests_total{{route="{path}",status="{code}"}} {count}' for (path, code), count in sorted(self.requests.items())
            ]
            lines += _family("fedpeft_first_token_seconds", "histogram", "From a request's arrival to its first token.")
            lines += self.first_token.lines("fedpeft_first_token_seconds")
            lines += _family("fedpeft_request_seconds", "histogram", "From a request's arrival to the end of its response.")
            lines += self.whole.lines("fedpeft_request_seconds")
        return "\n".join([*lines, *_engine(backend)]) + "\n"


def _engine(backend: Backend) -> list[str]:
    counts, swaps, (running, waiting) = backend.counts, backend.catalog.swaps, backend.engine.load
    gauges = {"running": running, "waiting": waiting, "adapters": len(backend.catalog.served())}
    totals: Mapping[str, int] = {
        "steps": counts.steps,
        "row_steps": counts.row_steps,
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "generations_finished": counts.finished,
        "generations_cancelled": counts.cancelled,
        "generations_failed": counts.failed,
        "versions_loaded": swaps.loaded,
        "versions_retired": swaps.retired,
        "versions_refused": swaps.refused,
    }
    rows = [line for name, value in gauges.items() for line in (f"# TYPE fedpeft_{name} gauge", f"fedpeft_{name} {value}")]
    return rows + [
        line for name, value in totals.items() for line in (f"# TYPE fedpeft_{name}_total counter", f"fedpeft_{name}_total {value}")
    ]


def _family(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
