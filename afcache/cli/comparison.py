"""Drawing with and without the cache, and showing both side by side."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from afcache.calibration.metrics import psnr, ssim
from afcache.parallel.config import ParallelConfig
from afcache.pipeline import compile_pipeline, uncached
from afcache.reports.records import report
from afcache.reports.summary import Report
from afcache.settings.config import CacheConfig

_ROUNDS = 3


@dataclass(frozen=True)
class Job:
    """One image to draw, and its file name without extension."""

    prompt: str
    seed: int
    stem: str


@dataclass(frozen=True)
class Comparison:
    """Cached against uncached, same prompt and seed."""

    job: Job
    uncached: np.ndarray
    cached: np.ndarray
    report: Report

    @property
    def psnr(self) -> float:
        """In dB."""
        return psnr(self.cached, self.uncached)

    @property
    def ssim(self) -> float:
        """1 means equal."""
        return ssim(self.cached, self.uncached)


class Draw:
    """Calls the pipeline for a job; returns float pixels `[height, width, 3]` in [0, 1]."""

    def __init__(self, pipe: FluxPipeline, options: dict[str, Any]) -> None:
        self.pipe = pipe
        self.options = options

    def __call__(self, job: Job) -> np.ndarray:
        """Draw one image with the job's seed."""
        generator = torch.Generator().manual_seed(job.seed)
        output: Any = self.pipe(prompt=job.prompt, generator=generator, output_type="np", **self.options)
        return output.images[0]


def timed(draw: Draw, job: Job) -> tuple[np.ndarray, float]:
    """Draw; return the image and the seconds it took."""
    began = time.perf_counter()
    image = draw(job)
    return image, time.perf_counter() - began


def compare(
    draw: Draw,
    jobs: list[Job],
    settings: CacheConfig,
    *,
    compiles: bool,
    output: Path | None,
    parallel: ParallelConfig | None = None,
) -> None:
    """Draw every job with and without the cache, then time both in alternation.

    Args:
        draw: calls the pipeline, which is cached.
        jobs: what to draw.
        settings: of the cache.
        compiles: whether the pipeline is compiled.
        output: where to write; None on ranks that draw along, and print nothing either.
        parallel: how ranks share the work. Uncached, each draws the whole image.

    """
    results = []
    for job in jobs:
        with uncached(draw.pipe):
            reference = draw(job)
        image = draw(job)
        results.append(Comparison(job, reference, image, report(draw.pipe)))
    draw.pipe.set_progress_bar_config(disable=True)
    ranks = "" if parallel is None else f", {parallel.processes} processes"
    timings = {f"compiled{ranks}": _alternate(draw, jobs[0])} if compiles else {}
    compile_pipeline(draw.pipe, settings, compile=False, parallel=parallel)
    timings[f"nothing compiled{ranks}"] = _alternate(draw, jobs[0])
    if output is None:
        return
    for result in results:
        save(output / f"{result.job.stem}.png", result.cached)
        save(output / f"{result.job.stem}_uncached.png", result.uncached)
        write_report(result.report, output, result.job)
    picture = output / "compare.png"
    _draw_comparison(results, picture)
    _print_comparison(results, timings, settings)
    print(f"side by side: {picture}")


def _alternate(draw: Draw, job: Job) -> tuple[float, float]:
    """Median seconds of one image, uncached (the pipeline as it is) and cached, timed in turns after a warm-up."""
    slow, fast = [], []
    draw(job)
    for _ in range(_ROUNDS):
        with uncached(draw.pipe):
            slow.append(timed(draw, job)[1])
        fast.append(timed(draw, job)[1])
    return statistics.median(slow), statistics.median(fast)


def _print_comparison(results: list[Comparison], timings: dict[str, tuple[float, float]], settings: CacheConfig) -> None:
    print(f"\n{'prompt':<42} {'steps computed (F) or forecast (.)':<36} {'blocks':>7} {'PSNR':>8} {'SSIM':>7}")
    for result in results:
        name = f"{result.job.prompt[:34]} #{result.job.seed}"
        print(
            f"{name:<42} {result.report.pattern():<36} {result.report.block_speedup:6.2f}x "
            f"{result.psnr:5.1f} dB {result.ssim:7.4f}"
        )
    ran, uncached_count = (
        sum(getattr(result.report, name) for result in results) for name in ("block_evaluations", "block_evaluations_uncached")
    )
    quality = statistics.mean(min(result.psnr, 150.0) for result in results)
    print(f"\nblock evaluations  {uncached_count / ran:.2f}x fewer, at {quality:.1f} dB (mean) against the uncached images")
    for how, (slow, fast) in timings.items():
        gain = f"{slow / fast:.2f}x faster" if fast < slow else f"{fast / slow:.2f}x slower"
        print(f"wall clock         {gain}: {slow:.2f} s uncached (eager), {fast:.2f} s cached ({how})")
    print(f"                   medians of {_ROUNDS} images, in turns, after warm-up")
    knob = f"tolerance {settings.tolerance:g}" if settings.policy == "adaptive" else f"policy {settings.policy}"
    print(f"settings           {knob}, warmup {settings.warmup_steps} steps")


def _draw_comparison(results: list[Comparison], path: Path) -> None:
    """One row per image: uncached, cached, and their difference, amplified as its title says."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = results[:8]
    figure = Figure(figsize=(8.4, 2.9 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), 3, squeeze=False)
    for axes, result in zip(grid, rows, strict=True):
        difference = np.abs(result.cached.astype(np.float64) - result.uncached)
        gain = 10
        panels = (
            (result.uncached, f"uncached: {result.job.prompt}"),
            (result.cached, f"cached, {result.report.block_speedup:.2f}x fewer blocks, {result.psnr:.1f} dB"),
            (np.clip(difference * gain, 0, 1), f"difference x {gain} (mean {difference.mean():.4f})"),
        )
        for axis, (image, title) in zip(axes, panels, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set_title(title, fontsize=8)
            axis.set_axis_off()
    figure.savefig(path, dpi=110)


def save(path: Path, image: np.ndarray) -> None:
    """Write float pixels in [0, 1] as a picture file."""
    Image.fromarray((image * 255).round().astype(np.uint8)).save(path)


def write_report(result: Report, output: Path, job: Job) -> None:
    """Write a job's report as JSON and as a plot."""
    result.to_json(output / f"{job.stem}.json")
    result.plot(output / f"{job.stem}_report.png")
