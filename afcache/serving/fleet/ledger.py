"""Sees every accepted request through, whatever becomes of the replicas that draw it."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable

from afcache.serving.fleet.asked import Asked, Drawn, Event, Failed, Progressed, Seen
from afcache.serving.fleet.book import Book, Entry

# (what is asked, checkpoint or None) -> its way to its image. What it raises is the replica's trouble, never the request's.
Draw = Callable[[Asked, bytes | None], AsyncGenerator[Event, None]]
# Seconds for which a replica's metrics are told after its last image.
_LATE = 600.0
_LOG = logging.getLogger(__name__)


class FullError(RuntimeError):
    """There are as many requests as are accepted."""


class Ledger:
    """One for a fleet.

    Args:
        book: where accepted requests are written down; those of before that are not done are seen through, too.
        draw: one of the replicas, whichever has room.
        max_accepted: requests that are accepted and not done.
        attempts: replicas that may die under a request, one after the other, without bringing it any further.
        pause: seconds before it is tried again.

    """

    def __init__(self, book: Book, draw: Draw, *, max_accepted: int = 1000, attempts: int = 5, pause: float = 0.5) -> None:
        self._book = book
        self._draw = draw
        self._max_accepted = max_accepted
        self._attempts = attempts
        self._pause = pause
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._last: dict[str, Progressed] = {}
        # When each told its metrics, and which.
        self._replicas: dict[str, tuple[float, dict[str, float]]] = {}

    def resume(self) -> int:
        """See those through that were accepted before this process began; how many there are."""
        entries = [entry for entry in self._book.unfinished() if entry.id not in self._tasks]
        for entry in entries:
            self._begin(entry)
        return len(entries)

    def accept(self, name: str, asked: Asked) -> None:
        """Take a request; one of this name that is known already stays what it is.

        Raises:
            FullError: there is no room.

        """
        if self._book.look(name) is None and len(self._tasks) >= self._max_accepted:
            raise FullError(f"{self._max_accepted} requests are on their way, which is all that are accepted. Ask again later.")
        if self._book.accept(name, asked):
            self._begin(Entry(name, asked, None))

    def look(self, name: str) -> Seen | None:
        """What is known of a request."""
        seen, last = self._book.look(name), self._last.get(name)
        if seen is None or last is None or seen.state != "waiting":
            return seen
        return seen.model_copy(
            update={
                "state": "drawing",
                "done": last.done,
                "steps": last.steps,
                "pattern": last.pattern,
                "replica": last.replica,
            }
        )

    def image(self, name: str) -> bytes | None:
        """Its PNG, where it has one."""
        return self._book.image(name)

    async def cancel(self, name: str) -> bool:
        """Give a request up; whether it was not done."""
        was_open = self._book.cancel(name)
        if (task := self._tasks.get(name)) is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return was_open

    def status(self) -> dict[str, dict[str, float]]:
        """Requests by their state, and the latest metrics of every replica that has drawn an image of late, by its name."""
        counted = self._book.count()
        drawing = sum(name in self._last for name in self._tasks)
        counted["waiting"] = counted.get("waiting", 0) - drawing
        states = ("waiting", "drawing", "drawn", "failed", "cancelled")
        latest = time.monotonic() - _LATE
        return {
            "requests": {each: float({**counted, "drawing": drawing}.get(each, 0)) for each in states},
            **{name: metrics for name, (told, metrics) in self._replicas.items() if told > latest},
        }

    async def close(self) -> None:
        """Leave everything as it is: who opens the book again goes on."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, entry: Entry) -> None:
        task = asyncio.get_running_loop().create_task(self._see_through(entry))
        self._tasks[entry.id] = task
        task.add_done_callback(lambda _: self._forget(entry.id))

    def _forget(self, name: str) -> None:
        self._tasks.pop(name, None)
        self._last.pop(name, None)

    async def _see_through(self, entry: Entry) -> None:
        """From replica to replica, until it is done."""
        name, asked, start = entry
        died = 0
        while True:
            began = start
            try:
                async with contextlib.aclosing(self._draw(asked, start)) as events:
                    async for event in events:
                        if isinstance(event, Progressed) and event.checkpoint is not None:
                            start, died = event.checkpoint, 0
                        if self._note(name, event, is_resumed=began is not None):
                            return
                if began is None:
                    raise RuntimeError("it ended without a word")
                # A checkpoint that is not taken, such as one of another version: from the beginning.
                start = None
                self._book.keep(name, None)
            except Exception as error:
                died += 1
                if (last := self._last.pop(name, None)) is not None:
                    self._replicas.pop(last.replica, None)
                self._book.move(name)
                _LOG.warning("request %s goes to another replica: %s", name, error)
                if died == self._attempts:
                    reason = (
                        f"{died} replicas died under it one after the other, the last one with {type(error).__name__}: {error}"
                    )
                    self._book.fail(name, reason)
                    return
                await asyncio.sleep(self._pause)

    def _note(self, name: str, event: Event, *, is_resumed: bool) -> bool:
        """Write down what has happened; whether that was the end."""
        match event:
            case Progressed():
                self._last[name] = event._replace(checkpoint=None)
                if event.checkpoint is not None:
                    self._book.keep(name, event.checkpoint)
                return False
            case Drawn(image, pattern, replica, metrics):
                self._replicas[replica] = time.monotonic(), metrics
                self._book.draw(name, image, pattern, replica)
                return True
            case Failed(reason):
                if is_resumed and name not in self._last:
                    return False
                self._book.fail(name, reason)
                return True
