"""Coroutines that sleep in a time of their own, which neither other work on the machine nor a slow disk stretches."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Selector(selectors.DefaultSelector):
    """Lets the time pass for which it is to wait, instead of waiting; where it is to wait for ever, it does."""

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
        # asyncio's own, a nanosecond, is lost beside months: who sleeps for so long would never wake.
        self._clock_resolution = 1e-6

    def time(self) -> float:
        return self._virtual.now


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Like `asyncio.run`: what sleeps wakes as soon as nothing else is to be done, the earliest first.

    For coroutines that wait for each other alone: before a thread or process answers, every time limit has passed. A sleep of
    no time passes none either: who tries again without a pause does so for ever.
    """
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(coroutine)
