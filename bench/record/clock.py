"""The one clock of all benchmarks: the library's own. Events on a GPU, so that nothing waits between; the wall on a CPU."""

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from afcache.runtime.clock import start_clock

_Result = TypeVar("_Result")


def seconds_of(action: Callable[[], _Result], device: torch.device | str = "cpu") -> tuple[_Result, float]:
    """What an action returns, and its seconds until the device has finished."""
    stop = start_clock(torch.device(device))
    result = action()
    return result, stop()()


def processor_seconds_of(action: Callable[[], _Result], *, is_brief: bool) -> tuple[_Result, float]:
    """The same on the processor's clock, on which other work of the machine counts little.

    Args:
        action: on a CPU.
        is_brief: count this thread alone, in nanoseconds; else whatever the process starts, too, such as compilers.

    """
    read = time.thread_time if is_brief else _process_and_children
    started = read()
    result = action()
    return result, read() - started


def _process_and_children() -> float:
    return sum(os.times()[:4])


class CallClock:
    """Seconds of every call of a module, taken outside of whatever forward is bound to it.

    Args:
        module: whose calls.
        device: it lives on.
        label: of the calls in a profile; None: none.

    """

    def __init__(self, module: torch.nn.Module, device: torch.device | str = "cpu", *, label: str | None = None) -> None:
        self._device = torch.device(device)
        self._label = label
        self._elapsed: list[Callable[[], float]] = []
        self._open: list[Any] = []
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)

    def _start(self, *_: Any) -> None:
        labels = [] if self._label is None else [torch.profiler.record_function(self._label)]
        for label in labels:
            label.__enter__()
        self._open = [start_clock(self._device), *labels]

    def _stop(self, *_: Any) -> None:
        stop, *labels = self._open
        self._elapsed.append(stop())
        for label in labels:
            label.__exit__(None, None, None)

    def take(self) -> list[float]:
        """Of every call since the last time that this was asked; waits for a GPU."""
        elapsed, self._elapsed = self._elapsed, []
        return [seconds() for seconds in elapsed]
