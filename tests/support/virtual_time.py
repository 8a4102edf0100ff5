"""Coroutines that sleep in a time of their own, which no other work on the machine and no slow disk stretches."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Selector(selectors.DefaultSelector):
    """Passes the time for which it is to wait, instead of waiting."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(None if timeout is None else 0)
        if not ready:
            self.now += max(timeout or 0.0, 0.0)
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Like `asyncio.run`: what sleeps wakes as soon as nothing else is to be done, and in the order of its hours.

    For coroutines that wait for each other alone: threads and processes take their time, and here none passes for them.
    """
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(coroutine)
