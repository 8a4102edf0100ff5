"""What a Batcher has done so far, in numbers."""

import collections
import dataclasses
import importlib
import time

import numpy as np

# Of so many requests the latency is kept.
_KEPT = 4096


@dataclasses.dataclass
class Metrics:
    """Counters, and the latencies of the last requests.

    Attributes:
        submitted, finished, failed, cancelled: requests.
        steps: of the requests that have finished; refreshes: those of them that were computed.
        calls: computed ones of the transformer; samples: in all of them.
        latencies: seconds from `submit` to the result.

    """

    submitted: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    steps: int = 0
    refreshes: int = 0
    calls: int = 0
    samples: int = 0
    latencies: collections.deque[float] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=_KEPT))
    started: float = dataclasses.field(default_factory=time.monotonic)

    def finish(self, pattern: str, seconds: float) -> None:
        """Count a request that has its image."""
        self.finished += 1
        self.steps += len(pattern)
        self.refreshes += pattern.count("F")
        self.latencies.append(seconds)

    def to_dict(self, *, running: int, waiting: int, state_bytes: int, max_batch: int) -> dict[str, float]:
        """All of them, with what follows from them.

        Args:
            running, waiting: requests that are drawn, and that wait for it.
            state_bytes: memory of all states.
            max_batch: samples that a computed call could have.

        """
        seconds = time.monotonic() - self.started
        percentiles = np.percentile(self.latencies, (50, 95, 99)) if self.latencies else (0.0, 0.0, 0.0)
        return {
            "requests_submitted": self.submitted,
            "requests_finished": self.finished,
            "requests_failed": self.failed,
            "requests_cancelled": self.cancelled,
            "requests_running": running,
            "requests_waiting": waiting,
            "requests_per_second": self.finished / seconds,
            "steps": self.steps,
            "refreshes": self.refreshes,
            "refreshes_saved": self.steps - self.refreshes,
            "batch_fill": self.samples / (self.calls * max_batch) if self.calls else 0.0,
            **{f"latency_p{share}_seconds": float(value) for share, value in zip((50, 95, 99), percentiles, strict=True)},
            "state_bytes": state_bytes,
        }


def prometheus_text(metrics: dict[str, float]) -> str:
    """The same as Prometheus reads it.

    Raises:
        ImportError: prometheus_client is not installed.

    """
    try:
        client = importlib.import_module("prometheus_client")
    except ImportError as error:
        raise ImportError("metrics as Prometheus text need prometheus_client: pip install prometheus_client") from error
    registry = client.CollectorRegistry()
    for name, value in metrics.items():
        client.Gauge(f"afcache_{name}", name.replace("_", " "), registry=registry).set(value)
    return client.generate_latest(registry).decode()
