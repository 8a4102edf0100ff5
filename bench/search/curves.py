"""Points of speed against quality, and what lies between them."""

import itertools
import statistics
from typing import NamedTuple

import numpy as np

from bench.record.spread import quantile


class Point(NamedTuple):
    """One evaluation.

    Attributes:
        speed: how many times fewer block evaluations; MLPs alone count as a block.
        psnr: of every seed, in dB, against the uncached image, 150 at most.
        flops: how many times fewer operations in the blocks.
        ssim: mean.
        accuracy: share of images that show the prompted digit.
        blocks: how many times fewer block evaluations, where `speed` counts something else.

    """

    speed: float
    psnr: tuple[float, ...]
    flops: float = 1.0
    ssim: float = 1.0
    accuracy: float = 1.0
    blocks: float = 1.0

    @property
    def mean(self) -> float:
        """Mean PSNR in dB."""
        return statistics.mean(self.psnr)

    @property
    def worst(self) -> float:
        """PSNR of the worst seed in dB."""
        return min(self.psnr)

    @property
    def tenth(self) -> float:
        """The 10th percentile of the seeds' PSNR in dB."""
        return quantile(self.psnr, 0.1)


def speed_at(curve: list[Point], quality: float) -> float:
    """The highest speed at which the mean PSNR is `quality`, linearly between points; 1 if none is that good.

    Where even the fastest point is better, its speed.
    """
    best = max((point.speed for point in curve if point.mean >= quality), default=1.0)
    for slow, fast in itertools.pairwise(sorted(curve)):
        if slow.mean >= quality > fast.mean:
            share = (slow.mean - quality) / (slow.mean - fast.mean)
            best = max(best, slow.speed + share * (fast.speed - slow.speed))
    return best


def worst_at(curve: list[Point], speed: float) -> float:
    """PSNR of the worst seed at a speed, linearly between the points; of points equally fast, the worst."""
    worst: dict[float, float] = {}
    for point in curve:
        worst[point.speed] = min(point.worst, worst.get(point.speed, np.inf))
    speeds = sorted(worst)
    return float(np.interp(speed, speeds, [worst[s] for s in speeds]))
