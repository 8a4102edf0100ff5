"""What a refresh and a cached step cost through the pipeline, with refreshes forced at fixed steps."""

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

import afcache
from afcache import CacheConfig
from afcache.runtime.compiled import CompileOptions
from afcache.settings.config import Target
from afcache.settings.presets import DEFAULT_TARGET, preset_config
from bench.models.random_flux import draw_random, make_pipeline, make_transformer
from bench.record.clock import CallClock, seconds_of
from bench.record.spread import shown_spread

STEPS = 28
WARMUP = 2


def time_image(pipe: Any, tokens: int) -> float:
    """Seconds of the whole pipeline for one image, always the same."""
    return seconds_of(lambda: draw_random(pipe, tokens, steps=STEPS))[1]


class Kind(NamedTuple):
    """What is forecast, and what is compiled."""

    target: Target
    compiled: Literal["step", "blocks"]


KINDS = (Kind("residual", "step"), Kind("noise", "step"), Kind("noise", "blocks"))


def forced(interval: int, target: Target = DEFAULT_TARGET) -> CacheConfig:
    """A refresh every `interval` steps after the warmup, with every computation that the presets make."""
    tuned = preset_config("balanced", target=target)
    return dataclasses.replace(tuned, policy="fixed", interval=interval, warmup_steps=WARMUP)


def measure_steps(
    tokens: int,
    intervals: Sequence[int],
    rounds: int,
    kinds: Sequence[Kind] = KINDS,
    *,
    dim: int = 512,
    backend: str = "inductor",
) -> list[dict[str, Any]]:
    """Rows of the main table for one number of tokens."""
    torch._dynamo.reset()
    contenders = list(itertools.product(kinds, intervals))
    transformers = [make_transformer(dim=dim, double=4, single=8) for _ in range(1 + len(contenders))]
    pipes = [make_pipeline(transformer) for transformer in transformers]
    clocks = [CallClock(transformer) for transformer in transformers]
    # Not Module.compile, which would trace the clock, too.
    # The same settings as ours.
    tuning = CompileOptions(backend=backend).tuning()
    transformers[0].forward = torch.compile(transformers[0].forward, fullgraph=True, backend=backend, **tuning)
    for pipe, (kind, interval) in zip(pipes[1:], contenders, strict=True):
        afcache.compile_pipeline(pipe, forced(interval, kind.target), compile=kind.compiled, backend=backend)
    for pipe in pipes:
        time_image(pipe, tokens)
    totals: list[list[float]] = [[] for _ in pipes]
    for clock in clocks:
        clock.take()
    for r in range(rounds):
        # Whoever comes first in one round comes later in the next.
        for i in range(len(pipes)):
            index = (i + r) % len(pipes)
            totals[index].append(time_image(pipes[index], tokens))
    plain, *ours = (clock.take() for clock in clocks)
    rows = []
    for i, ((kind, interval), seconds) in enumerate(zip(contenders, ours, strict=True), start=1):
        refreshes, cached = by_kind(seconds, afcache.report(pipes[i]).pattern())
        # Single images differ by the machine's mood; medians of steps do not, so the speed-up is made of them.
        gains = gain(plain, refreshes, cached)
        by_image = [_sum(plain, r) / _sum(seconds, r) for r in range(rounds)]
        by_pipeline = [a / b for a, b in zip(totals[0], totals[i], strict=True)]
        rows.append(
            {
                "image tokens": tokens,
                "target": kind.target,
                "compiled": kind.compiled,
                "refresh every": interval,
                "uncached step (ms)": shown_spread(plain, scale=1e3),
                "refresh (ms)": shown_spread(refreshes, scale=1e3),
                "cached step (ms)": shown_spread(cached, scale=1e3),
                "cached / refresh (%)": 100 * statistics.median(cached) / statistics.median(refreshes),
                "promised": gains["promised"],
                "speed-up": gains["speed-up"],
                "efficiency": gains["efficiency"],
                "speed-up, image by image": shown_spread(by_image),
                "speed-up, whole pipeline": shown_spread(by_pipeline),
            }
        )
    return rows


def _sum(seconds: list[float], image: int) -> float:
    return sum(seconds[image * STEPS : (image + 1) * STEPS])


def by_kind(seconds: list[float], pattern: str) -> tuple[list[float], list[float]]:
    """Seconds of refreshes, and of cached steps, of several images of one pattern."""
    both = list(zip(seconds, pattern * (len(seconds) // len(pattern)), strict=True))
    return [s for s, kind in both if kind == "F"], [s for s, kind in both if kind == "."]


def gain(plain_steps: list[float], refreshes: list[float], cached: list[float]) -> dict[str, float]:
    """Speed-up by the medians of steps, what the skipped blocks promise, and how much of that is kept."""
    count = len(refreshes) + len(cached)
    seconds = sum(len(kind) * statistics.median(kind) for kind in (refreshes, cached) if kind)
    speed_up, promised = statistics.median(plain_steps) * count / seconds, count / len(refreshes)
    return {"speed-up": speed_up, "promised": promised, "efficiency": speed_up / promised}
