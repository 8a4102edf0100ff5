"""A replica's work, as those see it who ask for it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from afcache.serving import batcher as batcher_module
from afcache.serving.fleet.asked import Asked, Drawn, Event, Failed, Progressed
from afcache.serving.fleet.drawer import Drawer
from afcache.serving.handle import EndedError
from tests.serving.fleet.conftest import DEFAULTS

pytestmark = [pytest.mark.host, pytest.mark.xdist_group("fleet")]
LONG = Asked(prompt="a handwritten two on a palace", steps=60, tolerance=0.0)


def with_drawer(pipe: Any, act: Callable[[Drawer], Awaitable[Any]], **options: Any) -> Any:
    drawer = Drawer(pipe, **{"name": "here", "defaults": DEFAULTS, "checkpoint_seconds": 0.0, **options})
    try:
        return asyncio.run(asyncio.wait_for(act(drawer), 60))  # pyright: ignore[reportArgumentType]
    finally:
        drawer.close()


async def collect(drawer: Drawer, asked: Asked, start: bytes | None = None) -> list[Event]:
    return [event async for event in drawer.draw(asked, start)]


def test_a_request_tells_how_far_it_is_and_goes_on_elsewhere(pipe):
    async def leave(drawer: Drawer) -> tuple[list[Event], list[Event]]:
        whole = await collect(drawer, LONG)
        begun: list[Event] = []
        stream = drawer.draw(LONG)
        async for event in stream:
            begun.append(event)
            if len(begun) == 3:
                await stream.aclose()
        return whole, begun

    whole, begun = with_drawer(pipe, leave)
    *way, drawn = whole
    assert isinstance(drawn, Drawn)
    assert drawn.metrics["requests_finished"] == 1
    assert [event.done for event in way] == sorted({event.done for event in way})
    assert all(event.steps == 60 and event.replica == "here" for event in way)
    last = begun[-1]
    assert isinstance(last, Progressed)

    resumed = with_drawer(pipe, lambda drawer: collect(drawer, LONG, last.checkpoint))
    first, end = resumed[0], resumed[-1]
    assert isinstance(first, Progressed)
    assert isinstance(end, Drawn)
    assert first.done >= last.done > 0
    assert (end.image, end.pattern) == (drawn.image, drawn.pattern)


def test_who_stops_listening_frees_the_place(pipe):
    async def leave(drawer: Drawer) -> dict[str, float]:
        stream = drawer.draw(LONG)
        await anext(stream)
        await stream.aclose()
        # There is room for one alone.
        assert isinstance((await collect(drawer, LONG))[-1], Drawn)
        return drawer._batcher.metrics()

    metrics = with_drawer(pipe, leave, max_requests=1)
    assert (metrics["requests_cancelled"], metrics["requests_finished"]) == (1, 1)


def test_who_comes_when_all_places_are_taken_waits(pipe):
    async def both(drawer: Drawer) -> list[list[Event]]:
        return list(await asyncio.gather(collect(drawer, LONG), collect(drawer, LONG)))

    assert all(isinstance(events[-1], Drawn) for events in with_drawer(pipe, both, max_requests=1))


def test_what_nobody_waits_for_is_dropped(pipe):
    """One that is drawn, and one that waits for its place."""

    async def drop(drawer: Drawer) -> list[Any]:
        drawn, waits = (asyncio.ensure_future(collect(drawer, LONG)) for _ in range(2))
        await asyncio.sleep(0.2)
        drawer.drop()
        found = list(await asyncio.gather(drawn, waits, return_exceptions=True))
        # There is room again.
        assert isinstance((await collect(drawer, LONG))[-1], Drawn)
        return found

    drawn, waits = with_drawer(pipe, drop, max_requests=1)
    assert isinstance(drawn[-1], Failed)
    assert isinstance(waits, EndedError)


def test_what_cannot_be_drawn_fails_in_the_pipelines_words(pipe):
    (failed,) = with_drawer(pipe, lambda drawer: collect(drawer, LONG), defaults={**DEFAULTS, "max_sequence_length": 600})
    assert isinstance(failed, Failed)
    assert failed.reason.startswith("ValueError: `max_sequence_length` cannot be greater than 512")
    (refused,) = with_drawer(pipe, lambda drawer: collect(drawer, LONG, b"nothing"))
    assert isinstance(refused, Failed)
    assert "start must be the bytes of Handle.checkpoint()" in refused.reason


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_batcher_that_has_died_is_nobodys_request_to_blame(pipe, monkeypatch):
    async def outlive(drawer: Drawer) -> None:
        drawer.check_health()

        def die() -> None:
            raise MemoryError("out of memory")

        monkeypatch.setattr(drawer._batcher._engine, "tick", die)
        with pytest.raises(EndedError, match="MemoryError"):
            await collect(drawer, LONG)
        drawer._batcher._thread.join()
        with pytest.raises(EndedError):
            await collect(drawer, LONG)
        with pytest.raises(EndedError, match="has ended"):
            drawer.check_health()

    with_drawer(pipe, outlive)
    assert batcher_module.EndedError is EndedError
