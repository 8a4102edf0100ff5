"""What `Batcher.submit` returns: a request's result to come."""

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, NamedTuple


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


class Handle:
    """A request on its way. It can be awaited, and asked from any thread.

    Args:
        number: by which the batcher knows it.
        future: of its result.
        progress: `() -> (steps behind it, all of its steps)`.
        cancel: `() -> whether it was still on its way`.

    """

    def __init__(
        self, number: int, future: "Future[Served]", progress: Callable[[], tuple[int, int]], cancel: Callable[[], bool]
    ) -> None:
        self.number = number
        self._future = future
        self._progress = progress
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

    def progress(self) -> tuple[int, int]:
        """Steps behind it, and all of its steps; (0, 0) while it waits for its turn."""
        return self._progress()

    def cancel(self) -> bool:
        """Give it up, and free its state; whether it was still on its way."""
        return self._cancel()

    def __await__(self) -> Generator[Any, None, Served]:
        return asyncio.wrap_future(self._future).__await__()
