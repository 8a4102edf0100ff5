"""Seconds of a call, without making the host wait for the device."""

import time
from collections.abc import Callable

import torch


def start_clock(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Start timing; call the result at the end to get a function that returns the seconds between."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()

        def stop_on_device() -> Callable[[], float]:
            end.record()

            def seconds() -> float:
                end.synchronize()
                return start.elapsed_time(end) / 1000

            return seconds

        return stop_on_device
    began = time.perf_counter()

    def stop() -> Callable[[], float]:
        elapsed = time.perf_counter() - began
        return lambda: elapsed

    return stop
