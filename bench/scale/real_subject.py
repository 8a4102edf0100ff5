"""A pipeline of a real size on a device: what its steps take, and which of them ran its blocks."""

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.models.real_pipelines import RealPipeline
from bench.record.clock import CallClock, seconds_of


class Subject:
    """A pipeline, and the seconds of its steps by the device's own clock.

    Args:
        model: which.
        arguments: of the command line.

    """

    def __init__(self, model: RealPipeline, arguments: argparse.Namespace) -> None:
        self.model, self.arguments = model, arguments
        self.pipe = model.make(device=arguments.device, is_small=arguments.small)
        self.transformer = self.pipe.transformer
        self._clock = CallClock(self.transformer, arguments.device)

    def draw(self, steps: int) -> Tensor:
        """Latents, always the same."""
        return self.model.draw(self.pipe, steps=steps, is_small=self.arguments.small)

    def images(self, rounds: int, steps: int) -> tuple[list[list[float]], list[float]]:
        """Seconds of every step of every image, and of the images."""
        parts, whole = [], []
        for _ in range(rounds):
            self._clock.take()
            whole.append(seconds_of(lambda: self.draw(steps), self.arguments.device)[1])
            calls = self._clock.take()
            each = len(calls) // steps
            parts.append([sum(calls[each * step : each * (step + 1)]) for step in range(steps)])
        return parts, whole

    def peak(self) -> float | None:
        """MiB since the last time that this was asked, weights included; None without a device that counts them."""
        if self.arguments.device != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return peak

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[str]]:
        """How many layers of the last block each call of the transformer ran, as letters: F, or . for none."""
        last = getattr(self.transformer, self.model.blocks)[-1]
        linears = [module for module in last.modules() if isinstance(module, torch.nn.Linear)]
        letters: list[str] = []
        ran = False

        def saw(*_: Any) -> None:
            nonlocal ran
            ran = True

        def ended(*_: Any) -> None:
            nonlocal ran
            letters.append("F" if ran else ".")
            ran = False

        hooks = [linear.register_forward_pre_hook(saw) for linear in linears]
        hooks.append(self.transformer.register_forward_hook(ended))
        try:
            yield letters
        finally:
            for hook in hooks:
                hook.remove()
