"""Drawing with and without the cache, timing both, and telling of it."""

import statistics
from pathlib import Path
from typing import Any

from afcache.cli.drawing import Draw, count_evaluations, say_what_is_missing, timed, write_report
from afcache.cli.jobs import Job
from afcache.cli.pictures import clear, save
from afcache.cli.side_by_side import Comparison, show_side_by_side
from afcache.parallel.config import ParallelConfig
from afcache.pipeline import compile_pipeline, uncached
from afcache.reports.records import report
from afcache.settings.rules import RULES

_ROUNDS = 3


def compare(
    draw: Draw,
    jobs: list[Job],
    settings: dict[str, Any],
    *,
    compiles: bool,
    output: Path | None,
    parallel: ParallelConfig | None = None,
) -> None:
    """Draw every job with and without the cache, then time both in alternation.

    Args:
        draw: calls the pipeline, which is cached.
        jobs: what to draw.
        settings: of the cache, as `compile_pipeline` takes them.
        compiles: whether the pipeline is compiled.
        output: where to write; None on ranks that draw along, and print nothing either.
        parallel: how ranks share the work. Uncached, each draws the whole image.

    """
    results = []
    for job in jobs:
        with uncached(draw.pipe):
            reference = draw(job)
        drawn = draw(job)
        results.append(Comparison(job, reference, drawn, report(draw.pipe)))
    draw.pipe.set_progress_bar_config(disable=True)
    ranks = "" if parallel is None else f", {parallel.processes} processes"
    timings = {f"compiled{ranks}": _alternate(draw, jobs[0])} if compiles else {}
    compile_pipeline(draw.pipe, **settings, compile=False, parallel=parallel)
    timings[f"nothing compiled{ranks}"] = _alternate(draw, jobs[0])
    if output is None:
        return
    for result in results:
        clear(output / result.job.stem)
        save(output / result.job.stem, result.cached)
        save(output / f"{result.job.stem}_uncached", result.uncached)
        write_report(result.report, output, result.job)
    shown = show_side_by_side(results, output)
    _print_comparison(results, timings)
    say_what_is_missing(results[-1].cached)
    print(f"side by side: {shown}")


def _alternate(draw: Draw, job: Job) -> tuple[float, float]:
    """Median seconds of one image, uncached (the pipeline as it is) and cached, timed in turns after a warm-up."""
    slow, fast = [], []
    draw(job)
    for _ in range(_ROUNDS):
        with uncached(draw.pipe):
            slow.append(timed(draw, job)[1])
        fast.append(timed(draw, job)[1])
    return statistics.median(slow), statistics.median(fast)


def _print_comparison(results: list[Comparison], timings: dict[str, tuple[float, float]]) -> None:
    noun = "videos" if results[0].cached.is_video else "images"
    clips = [result.clip for result in results]
    in_time = f" {'worst frame':>12} {'flicker':>8}" if all(clips) else ""
    print(f"\n{'prompt':<42} {'steps computed (F) or forecast (.)':<36} {'blocks':>7} {'PSNR':>8} {'SSIM':>7}{in_time}")
    for result, clip in zip(results, clips, strict=True):
        in_time = "" if clip is None else f" {clip.worst_frame:9.1f} dB {clip.flicker:8.4f}"
        print(
            f"{result.job.label:<42} {result.report.pattern():<36} {result.report.block_speedup:6.2f}x "
            f"{result.psnr:5.1f} dB {result.ssim:7.4f}{in_time}"
        )
    if all(clips):
        print("flicker: what changes from frame to frame and should not, relative to what moves; 0 is none")
    ran, uncached_count = count_evaluations([result.report for result in results])
    quality = statistics.mean(min(result.psnr, 150.0) for result in results)
    print(f"\nblock evaluations  {uncached_count / ran:.2f}x fewer, at {quality:.1f} dB (mean) against the uncached {noun}")
    for how, (slow, fast) in timings.items():
        gain = f"{slow / fast:.2f}x faster" if fast < slow else f"{fast / slow:.2f}x slower"
        print(f"wall clock         {gain}: {slow:.2f} s uncached (eager), {fast:.2f} s cached ({how})")
    note = "; what the compiler gains is in the first line, too" if len(timings) > 1 else ""
    print(f"                   medians of {_ROUNDS} {noun}, in turns, after warm-up{note}")
    drawn_with = results[-1].report.config
    is_error_controlled = RULES[drawn_with["policy"]].is_error_controlled
    knob = f"tolerance {drawn_with['tolerance']:g}" if is_error_controlled else f"policy {drawn_with['policy']}"
    print(f"settings           {knob}, warmup {drawn_with['warmup_steps']} steps")
