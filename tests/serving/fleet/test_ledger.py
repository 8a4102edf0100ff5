"""Accepted requests are seen through, whatever becomes of those that draw them and of the ledger itself."""

import asyncio
import random
import sqlite3
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest

from afcache.serving.fleet import ledger as ledger_module
from afcache.serving.fleet.asked import Asked, Drawn, Event, Failed, Progressed
from afcache.serving.fleet.book import Book
from afcache.serving.fleet.ledger import Ledger
from tests.support import virtual_time

ASKED = Asked(prompt="a cat", steps=4)
IMAGE = Drawn(b"png", "F..F", "one", {"steps": 4.0})
Script = list[Any]


class Replicas:
    """Draws by scripts, one for each try; notes with which checkpoint each began."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.starts: list[bytes | None] = []
        self.left = 0

    async def draw(self, asked: Asked, start: bytes | None) -> AsyncGenerator[Event, None]:
        assert asked == ASKED
        self.starts.append(start)
        try:
            for event in self.scripts.pop(0) if self.scripts else [asyncio.sleep]:
                if isinstance(event, Exception):
                    raise event
                if event is asyncio.sleep:
                    await asyncio.sleep(60)
                else:
                    assert isinstance(event, Progressed | Drawn | Failed)
                    yield event
                    await asyncio.sleep(0)
        finally:
            self.left += 1


def at(done: int, checkpoint: bytes | None = None) -> Progressed:
    return Progressed(done, 4, "F..F"[:done], "one", checkpoint)


def run(tmp_path: Path, replicas: Replicas, act: Callable[[Ledger], object], **limits: int) -> Ledger:
    """Let a ledger of these replicas do something, within a loop, and wait for what it began."""

    async def go() -> Ledger:
        ledger = Ledger(Book(tmp_path / "book"), replicas.draw, pause=0.01, **limits)
        found = act(ledger)
        if asyncio.iscoroutine(found):
            await found
        await asyncio.wait_for(asyncio.gather(*ledger._tasks.values()), 10)
        return ledger

    return virtual_time.run(go())


def test_a_request_is_drawn(tmp_path):
    replicas = Replicas([at(1), at(2), IMAGE])
    ledger = run(tmp_path, replicas, lambda ledger: ledger.accept("a", ASKED))
    seen = ledger.look("a")
    assert seen is not None
    assert (seen.state, seen.done, seen.steps, seen.pattern, seen.replica, seen.moved) == ("drawn", 4, 4, "F..F", "one", 0)
    assert seen.seconds is not None
    assert ledger.image("a") == b"png"
    assert ledger.status() == {
        "requests": {"waiting": 0, "drawing": 0, "drawn": 1, "failed": 0, "cancelled": 0},
        "one": {"steps": 4.0},
    }
    assert ledger.look("b") is None
    assert ledger.image("b") is None


def test_another_replica_goes_on_where_the_last_checkpoint_was(tmp_path):
    replicas = Replicas([at(1), at(2, b"two"), at(3), OSError("killed")], [at(3), IMAGE])
    ledger = run(tmp_path, replicas, lambda ledger: ledger.accept("a", ASKED))
    seen = ledger.look("a")
    assert replicas.starts == [None, b"two"]
    assert seen is not None
    assert (seen.state, seen.moved, seen.resumed) == ("drawn", 1, 2)


def test_one_that_kills_its_replicas_fails_in_the_end(tmp_path):
    deaths: list[Script] = [[OSError("out of memory")] for _ in range(9)]
    replicas = Replicas(*deaths)
    ledger = run(tmp_path, replicas, lambda ledger: ledger.accept("a", ASKED), attempts=3)
    seen = ledger.look("a")
    assert seen is not None
    assert (seen.state, seen.moved) == ("failed", 3)
    assert seen.error == "3 replicas died under it one after the other, the last one with OSError: out of memory"


def test_one_that_gets_further_may_lose_as_many_as_it_takes(tmp_path):
    deaths: list[Script] = [[at(1, bytes([n])), OSError("killed")] for n in range(6)]
    ledger = run(tmp_path, Replicas(*deaths, [IMAGE]), lambda ledger: ledger.accept("a", ASKED), attempts=2)
    seen = ledger.look("a")
    assert seen is not None
    assert (seen.state, seen.moved) == ("drawn", 6)


def test_what_fails_is_not_tried_again(tmp_path):
    replicas = Replicas([Failed("ValueError: no such size")], [IMAGE])
    ledger = run(tmp_path, replicas, lambda ledger: ledger.accept("a", ASKED))
    seen = ledger.look("a")
    assert seen is not None
    assert (seen.state, seen.error, len(replicas.starts)) == ("failed", "ValueError: no such size", 1)


def test_a_checkpoint_that_nobody_takes_is_let_go(tmp_path):
    """Such as one of another version: the request begins anew."""
    replicas = Replicas([at(2, b"old"), OSError("killed")], [Failed("ValueError: start must be ...")], [at(1), IMAGE])
    ledger = run(tmp_path, replicas, lambda ledger: ledger.accept("a", ASKED))
    seen = ledger.look("a")
    assert replicas.starts == [None, b"old", None]
    assert seen is not None
    assert seen.state == "drawn"


def test_a_replica_that_ends_without_a_word_has_died(tmp_path):
    replicas = Replicas([at(1)], [IMAGE])
    ledger = run(tmp_path, replicas, lambda ledger: ledger.accept("a", ASKED))
    seen = ledger.look("a")
    assert seen is not None
    assert (seen.state, seen.moved) == ("drawn", 1)


def test_another_ledger_sees_through_what_was_accepted(tmp_path):
    """The process that had accepted them is gone."""

    async def die() -> None:
        ledger = Ledger(Book(tmp_path / "book"), Replicas([at(2, b"two"), at(3)]).draw, pause=60.0)
        ledger.accept("a", ASKED)
        ledger.accept("b", ASKED)
        await asyncio.sleep(0.1)
        await ledger.close()

    virtual_time.run(die())
    replicas = Replicas([IMAGE], [IMAGE])
    ledger = run(tmp_path, replicas, lambda ledger: ledger.resume())
    assert sorted(replicas.starts, key=str) == [None, b"two"]
    assert ledger.status()["requests"]["drawn"] == 2
    assert run(tmp_path, Replicas(), lambda ledger: ledger.resume())._tasks == {}


def test_a_disk_that_is_busy_for_a_moment_loses_nothing(tmp_path):
    """Nor is it a replica's death."""
    replicas = Replicas([at(2, b"two"), IMAGE], [IMAGE])

    async def disturb(ledger: Ledger) -> None:
        keep = ledger._book.keep

        def fail_once(*given: Any, **more: Any) -> None:
            ledger._book.keep = keep
            raise sqlite3.OperationalError("database is locked")

        ledger._book.keep = fail_once
        ledger.accept("a", ASKED)

    ledger = run(tmp_path, replicas, disturb)
    seen = ledger.look("a")
    assert replicas.starts == [None, b"two"]
    assert seen is not None
    assert (seen.state, seen.moved) == ("drawn", 0)


def test_what_cannot_be_read_fails_alone(tmp_path):
    book = Book(tmp_path / "book")
    for name in "ab":
        book.accept(name, ASKED)
    book._base.execute("""UPDATE requests SET asked = '{"prompt": "a cat", "of_another_version": 1}' WHERE id = 'a'""")
    book.close()
    ledger = run(tmp_path, Replicas([IMAGE]), lambda ledger: ledger.resume())
    seen = {name: ledger.look(name) for name in "ab"}
    assert [each and each.state for each in seen.values()] == ["failed", "drawn"]
    assert seen["a"] is not None
    assert seen["a"].error == "it was written by another version: 1 fields are not as they are now"


@pytest.mark.parametrize("seed", range(40))
def test_neighbours_outlive_one_that_kills_its_replica(tmp_path, monkeypatch, seed: int):
    """It takes all with it that are drawn beside it; they come back at other times, whatever the seed."""
    monkeypatch.setattr(ledger_module, "random", random.Random(seed))
    beside: set[int] = set()
    numbers = iter(range(10_000))

    async def draw(asked: Asked, start: bytes | None) -> AsyncGenerator[Event, None]:
        mine = next(numbers)
        beside.add(mine)
        for _ in range(5):
            await asyncio.sleep(0.002)
            if asked.prompt == "poison":
                beside.clear()
                raise OSError("out of memory")
            if mine not in beside:
                raise OSError("killed by a neighbour")
            yield at(1)
        yield IMAGE

    async def go() -> list[str | None]:
        ledger = Ledger(Book(tmp_path / "book"), draw, pause=0.05)
        for name, prompt in (("poison", "poison"), *((str(index), "a cat") for index in range(6))):
            ledger.accept(name, Asked(prompt=prompt))
        await asyncio.wait_for(asyncio.gather(*ledger._tasks.values()), 30)
        return [seen and seen.state for seen in map(ledger.look, ("poison", *map(str, range(6))))]

    assert virtual_time.run(go()) == ["failed", *["drawn"] * 6]


def test_a_book_is_of_one_model_while_something_is_to_be_drawn(tmp_path):
    book = Book(tmp_path / "book")
    assert book.model("one") == "one"
    assert book.model("two") == "two"
    book.accept("a", ASKED)
    assert book.model("three") == "two"
    book.cancel("a")
    assert book.model("three") == "three"


def test_a_name_is_accepted_once(tmp_path):
    def twice(ledger: Ledger) -> None:
        assert ledger.accept("a", ASKED) == "accepted"
        assert ledger.accept("a", ASKED) == "accepted"
        assert ledger.accept("a", Asked(prompt="a dog")) == "other"

    replicas = Replicas([IMAGE], [IMAGE])
    run(tmp_path, replicas, twice)
    assert len(replicas.starts) == 1


def test_who_gives_up_frees_its_replica(tmp_path):
    replicas = Replicas([at(2), asyncio.sleep])

    async def give_up(ledger: Ledger) -> None:
        ledger.accept("a", ASKED)
        await asyncio.sleep(0.05)
        assert await ledger.cancel("a")
        assert min(ledger.status()["requests"].values()) == 0
        assert not await ledger.cancel("a")

    ledger = run(tmp_path, replicas, give_up)
    seen = ledger.look("a")
    assert seen is not None
    assert (seen.state, seen.done, seen.steps, seen.pattern) == ("cancelled", 2, 4, "F.")
    assert replicas.left == 1
    assert not run(tmp_path, Replicas(), lambda ledger: ledger.resume())._tasks


def test_so_many_are_accepted_and_no_more(tmp_path):
    async def fill(ledger: Ledger) -> None:
        ledger.accept("a", ASKED)
        ledger.accept("a", ASKED)
        assert ledger.accept("b", ASKED) == "full"
        await ledger.cancel("a")
        ledger.accept("c", ASKED)

    ledger = run(tmp_path, Replicas([IMAGE]), fill, max_accepted=1)
    assert ledger.look("b") is None
    assert ledger.status()["requests"] == {"waiting": 0, "drawing": 0, "drawn": 1, "failed": 0, "cancelled": 1}


def test_those_that_are_done_are_forgotten_in_the_end(tmp_path):
    book = Book(tmp_path / "book", kept=2)
    for name in "abcd":
        book.accept(name, ASKED)
    for name in "abc":
        book.draw(name, b"png", "F", "one")
    assert [book.look(name) is None for name in "abcd"] == [True, False, False, False]
    assert [entry.id for entry in book.unfinished()] == ["d"]
    # What is done stays as it is.
    book.fail("c", "late")
    seen = book.look("c")
    assert seen is not None
    assert (seen.state, seen.error) == ("drawn", None)
