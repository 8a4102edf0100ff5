"""Drawing with and without the cache, and showing both side by side."""

import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from afcache.calibration.metrics import psnr, ssim
from afcache.cli.drawing import Draw, clear, count_evaluations, save, timed, write_report
from afcache.cli.model import Job
from afcache.parallel.config import ParallelConfig
from afcache.pipeline import compile_pipeline, uncached
from afcache.reports.records import report
from afcache.reports.summary import Report
from afcache.settings.config import CacheConfig

_ROUNDS = 3
# Of a difference; larger ones would show what rounding alone does.
_FACTORS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


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
        clear(output, result.job)
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
    ran, uncached_count = count_evaluations([result.report for result in results])
    quality = statistics.mean(min(result.psnr, 150.0) for result in results)
    print(f"\nblock evaluations  {uncached_count / ran:.2f}x fewer, at {quality:.1f} dB (mean) against the uncached images")
    for how, (slow, fast) in timings.items():
        gain = f"{slow / fast:.2f}x faster" if fast < slow else f"{fast / slow:.2f}x slower"
        print(f"wall clock         {gain}: {slow:.2f} s uncached (eager), {fast:.2f} s cached ({how})")
    note = "; what the compiler gains is in the first line, too" if len(timings) > 1 else ""
    print(f"                   medians of {_ROUNDS} images, in turns, after warm-up{note}")
    knob = f"tolerance {settings.tolerance:g}" if settings.rule.is_error_controlled else f"policy {settings.policy}"
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
        gain = amplification(difference)
        panels = (
            (result.uncached, f"uncached: {result.job.prompt}"),
            (result.cached, f"cached, {result.report.block_speedup:.2f}x fewer blocks, {result.psnr:.1f} dB"),
            (np.clip(difference * gain, 0, 1), difference_title(difference, gain)),
        )
        for axis, (image, title) in zip(axes, panels, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set_title(title, fontsize=8)
            axis.set_axis_off()
    figure.savefig(path, dpi=110)


def amplification(difference: np.ndarray) -> int:
    """The factor that makes a difference visible: of 1, 2, 5, 10, ... the largest that keeps 99 % of it below white.

    Args:
        difference: absolute, of pixels in [0, 1].

    """
    bright = float(np.quantile(difference, 0.99))
    fitting = [factor for factor in _FACTORS if factor * bright <= 1.0]
    return fitting[-1] if fitting else 1


def difference_title(difference: np.ndarray, gain: int) -> str:
    """What the third picture shows."""
    if not difference.any():
        return "no difference"
    return f"their difference x {gain} (mean {difference.mean():.5f})"
