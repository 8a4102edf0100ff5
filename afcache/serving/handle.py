"""What `Batcher.submit` takes and returns: a request, and its result to come."""

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, NamedTuple

from afcache.serving.checkpoint import Kept
from afcache.serving.running import Progress
from afcache.settings.config import CacheConfig


class BusyError(RuntimeError):
    """There are as many requests as the batcher takes."""


class EndedError(RuntimeError):
    """The batcher was closed, or its thread has died: no request's fault."""


class Served(NamedTuple):
    """A request's result.

    Attributes:
        image: as the pipeline was asked for it.
        pattern: F for each step that was computed, . for one that was forecast.
        seconds: from `submit` to now.

    """

    image: Any
    pattern: str
    seconds: float


class Request(NamedTuple):
    """What was submitted.

    Attributes:
        number: by which the batcher knows it.
        arguments: of the pipeline's call.
        config: settings.
        rank: those of a lower one are computed first.
        start: where it goes on; None from the beginning.
        future: of its result.
        started: when, by the monotonic clock.

    """

    number: int
    arguments: dict[str, Any]
    config: CacheConfig
    rank: float
    start: Kept | None
    future: "Future[Served]"
    started: float


class Handle:
    """A request on its way. It can be awaited, and asked from any thread.

    Args:
        number: by which the batcher knows it.
        future: of its result.
        progress: `() -> its progress`.
        checkpoint: `() -> its bytes, or None while it waits or when it is done`.
        cancel: `() -> whether it was still on its way`.

    """

    def __init__(
        self,
        number: int,
        future: "Future[Served]",
        *,
        progress: Callable[[], Progress],
        checkpoint: Callable[[], bytes | None],
        cancel: Callable[[], bool],
    ) -> None:
        self.number = number
        self._future = future
        self._progress = progress
        self._checkpoint = checkpoint
        self._cancel = cancel

    def result(self, timeout: float | None = None) -> Served:
        """Wait for the image.

        Args:
            timeout: seconds; None waits for as long as it takes.

        Raises:
            TimeoutError: it is not there yet.
            concurrent.futures.CancelledError: it was cancelled.
            Exception: what stopped this request.

        """
        return self._future.result(timeout)

    def done(self) -> bool:
        """Whether there is a result, a failure, or nothing to come."""
        return self._future.done()

    def progress(self) -> Progress:
        """How far it is."""
        return self._progress()

    def checkpoint(self) -> bytes | None:
        """Where it is, as bytes: `submit(..., start=)` of a batcher of the same model and settings goes on there.

        Returns:
            None while it waits for its turn, and after its last step.
        Cost:
            as many bytes as its state; waits for the device, never for a tick.

        """
        return self._checkpoint()

    def cancel(self) -> bool:
        """Give it up, and free its state; whether it was still on its way."""
        return self._cancel()

    def __await__(self) -> Generator[Any, None, Served]:
        return asyncio.wrap_future(self._future).__await__()
