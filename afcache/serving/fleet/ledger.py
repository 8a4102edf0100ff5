"""Sees every accepted request through, whatever becomes of the replicas that draw it."""

import asyncio
import contextlib
import dataclasses
import logging
import random
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable
from typing import Literal

from afcache.serving.fleet.asked import Asked, Drawn, Event, Failed, Progressed, Seen
from afcache.serving.fleet.book import Book, Entry

# (what is asked, checkpoint or None) -> its way to its image. What it raises is the replica's trouble, never the request's.
Draw = Callable[[Asked, bytes | None], AsyncGenerator[Event, None]]
# "other": something else was accepted under this name.
Answer = Literal["accepted", "full", "other"]
# Seconds for which a replica's metrics are told after its last image.
_LATE = 600.0
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class _Way:
    """A request on its way.

    Attributes:
        entry: the request, with the last checkpoint.
        died: replicas, one after the other, that have brought it no further.
        last: how far it was when last heard of.

    """

    entry: Entry
    died: int = 0
    last: Progressed | None = None


class Ledger:
    """One for a fleet.

    Args:
        book: where accepted requests are written down; those of before that are not done are seen through, too.
        draw: one of the replicas, whichever has room.
        max_accepted: requests that are accepted and not done.
        attempts: replicas that may die under a request, one after the other, without bringing it any further.
        pause: seconds before it is tried again, about twice as long each time: where one request kills its replicas, those
            beside it come back at other times than it does.

    """

    def __init__(self, book: Book, draw: Draw, *, max_accepted: int = 1000, attempts: int = 5, pause: float = 0.5) -> None:
        self._book = book
        self._draw = draw
        self._max_accepted = max_accepted
        self._attempts = attempts
        self._pause = pause
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ways: dict[str, _Way] = {}
        # When each told its metrics, and which.
        self._replicas: dict[str, tuple[float, dict[str, float]]] = {}

    def resume(self) -> int:
        """See those through that were accepted before this process began; how many there are."""
        entries = [entry for entry in self._book.unfinished() if entry.id not in self._tasks]
        for entry in entries:
            self._begin(entry)
        return len(entries)

    def accept(self, name: str, asked: Asked) -> Answer:
        """Take a request; the same one may come again under its name."""
        known = self._book.asked(name)
        if known is not None:
            return "accepted" if known == asked.model_dump_json() else "other"
        if len(self._tasks) >= self._max_accepted:
            return "full"
        self._book.accept(name, asked)
        self._begin(Entry(name, asked))
        return "accepted"

    def look(self, name: str) -> Seen | None:
        """What is known of a request."""
        seen, way = self._book.look(name), self._ways.get(name)
        if seen is None or way is None or way.last is None or seen.state != "waiting":
            return seen
        return seen.model_copy(update={"state": "drawing", **way.last._asdict()})

    def image(self, name: str) -> bytes | None:
        """Its PNG, where it has one."""
        return self._book.image(name)

    async def cancel(self, name: str) -> bool:
        """Give a request up; whether it was not done."""
        way, task = self._ways.get(name), self._tasks.get(name)
        last = None if way is None else way.last
        how_far = {} if last is None else {"done": last.done, "steps": last.steps, "pattern": last.pattern}
        was_open = self._book.cancel(name, **how_far)
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return was_open

    def status(self) -> dict[str, dict[str, float]]:
        """Requests by their state, and the latest metrics of every replica that has drawn an image of late, by its name."""
        states: dict[str, float] = dict.fromkeys(("waiting", "drawing", "drawn", "failed", "cancelled"), 0.0)
        states |= {state: float(count) for state, count in self._book.count().items()}
        drawing = sum(name in self._ways and self._ways[name].last is not None for name in self._book.open())
        states |= {"waiting": states["waiting"] - drawing, "drawing": float(drawing)}
        latest = time.monotonic() - _LATE
        return {"requests": states, **{name: each for name, (told, each) in self._replicas.items() if told > latest}}

    async def close(self) -> None:
        """Leave everything as it is: who opens the book again goes on."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, entry: Entry) -> None:
        self._ways[entry.id] = _Way(entry)
        task = asyncio.get_running_loop().create_task(self._see_through(self._ways[entry.id]))
        self._tasks[entry.id] = task
        task.add_done_callback(lambda _: self._forget(entry.id))

    def _forget(self, name: str) -> None:
        self._tasks.pop(name, None)
        self._ways.pop(name, None)

    async def _see_through(self, way: _Way) -> None:
        """From replica to replica, until it is done."""
        name, longest = way.entry.id, 0
        while True:
            try:
                if await self._attempt(way):
                    return
            except sqlite3.Error as error:
                # The disk's trouble, which passes: what it says is in vain as long as it lasts.
                _LOG.warning("request %s is tried again: %s", name, error)
            except Exception as error:
                _LOG.warning("request %s goes to another replica: %s", name, error)
                with contextlib.suppress(sqlite3.Error):
                    if self._has_failed(way, error):
                        return
            longest = max(longest, way.died)
            way.last = None
            await asyncio.sleep(self._pause * 2 ** min(longest, 6) * random.uniform(0.5, 1.0))

    async def _attempt(self, way: _Way) -> bool:
        """By one replica; whether it is done."""
        name, asked, start, _ = way.entry
        is_first_word = True
        async with contextlib.aclosing(self._draw(asked, start)) as events:
            async for event in events:
                match event:
                    case Progressed(checkpoint=None):
                        way.last = event
                    case Progressed(done, steps, pattern, _, bytes() as checkpoint):
                        way.last = event._replace(checkpoint=None)
                        way.entry, way.died = Entry(name, asked, checkpoint, done), 0
                        self._book.keep(name, checkpoint, done=done, steps=steps, pattern=pattern)
                    case Drawn(image, pattern, replica, metrics):
                        self._replicas[replica] = time.monotonic(), metrics
                        self._book.draw(name, image, pattern, replica)
                        return True
                    case Failed() if start is not None and is_first_word:
                        # A checkpoint that is not taken, such as one of another version: from the beginning.
                        way.entry = Entry(name, asked)
                        self._book.forget(name)
                        return False
                    case Failed(reason):
                        self._book.fail(name, reason)
                        return True
                is_first_word = False
        raise RuntimeError("it ended without a word")

    def _has_failed(self, way: _Way, error: Exception) -> bool:
        """Count a replica's death; whether that was one too many."""
        way.died += 1
        if way.last is not None:
            self._replicas.pop(way.last.replica, None)
        self._book.move(way.entry.id, way.entry.done)
        if way.died < self._attempts:
            return False
        said = f"{type(error).__name__}: {error}"
        self._book.fail(way.entry.id, f"{way.died} replicas died under it one after the other, the last one with {said}")
        return True
