"""A target instead of a knob: the tolerance that reaches a speed or a quality, found by measuring."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm

from afcache._checks import check_flag, check_integer
from afcache.calibration.metrics import psnr
from afcache.models.families import draws_videos
from afcache.pipeline import compile_pipeline, restore_pipeline
from afcache.reports.records import report
from afcache.runtime.binding import bound_runtime
from afcache.settings.changes import at_tolerance
from afcache.settings.config import CacheConfig
from afcache.settings.curve import EQUAL_PSNR, Calibration, CurvePoint, check_targets
from afcache.settings.presets import resolve_config

SMALLEST, FIRST, LARGEST = 2.0**-14, 2.0**-6, 4.0
_MOST_POINTS = 12
_CLOSE = 0.01  # relative distance to the target at which no better one is looked for
_FINEST = 1.02  # ratio of neighbouring tolerances
_OWN_OPTIONS = ("prompt", "generator", "output_type", "num_images_per_prompt", "return_dict")


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    target_speedup: float | None = None,
    target_psnr: float | None = None,
    config: CacheConfig | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> CacheConfig:
    """Find the tolerance that reaches a speed or a quality on these prompts.

    import afcache

    config = afcache.calibrate(pipe, prompts, target_psnr=40, num_inference_steps=28)
    config.to_json("at_40_dB.json")
    pipe = afcache.compile_pipeline(pipe, config)
    pipe = afcache.compile_pipeline(pipe, afcache.CacheConfig.from_json("at_40_dB.json"))

    Every prompt is drawn uncached, and then at one tolerance after another, until the target lies between two neighbours. What
    is found holds for prompts, sizes and step counts like these: 16 prompts or more give a mean that carries over.

    Args:
        pipe: a pipeline that `compile_pipeline` would take, uncached. It stays so.
        prompts: what to draw, a seed of its own each.
        target_speedup: how many times fewer block evaluations at least; 1 or more. Wall clock follows it, less what is outside
            of the transformer.
        target_psnr: mean PSNR in dB against the uncached images at least; 0 or more.
        config: settings under policy "adaptive" whose tolerance is searched; by default those that presets are made of.
        seed: of the first prompt; the others count up.
        progress: whether to show a bar.
        options: of the pipeline's call, e.g. `num_inference_steps`, `height`, `width`, `true_cfg_scale`.

    Returns:
        the settings whose measured point meets the target, the fastest or the best of them; `calibration` holds the curve.

    Raises:
        ValueError: not exactly one target, one out of its range or beyond what the tolerance can reach, no prompts, options
            that calibration sets itself, another policy, or a pipeline that is cached already.
        TypeError: a value is of the wrong kind.
    Cost:
        1 + 5 to 12 times the images, without compiling; decisions are those of the compiled step.

    """
    _check(pipe, prompts, target_speedup, target_psnr, config, seed, progress, options)
    jobs = [(prompt, seed + index) for index, prompt in enumerate(prompts)]
    with _quiet(pipe), tqdm(total=len(jobs) * (1 + _MOST_POINTS), desc="uncached", disable=not progress, leave=False) as bar:

        def draw(prompt: str, number: int) -> Any:
            generator = torch.Generator().manual_seed(number)
            # The first field, whatever it is called; of the batch the only one.
            drawn = pipe(prompt=prompt, generator=generator, output_type="np", **options)[0][0]
            bar.update()
            return drawn

        references = [draw(*job) for job in jobs]

        def measure(tolerance: float) -> CurvePoint:
            bar.set_description(f"tolerance {tolerance:.4g}")
            compile_pipeline(pipe, _at(pipe, config, tolerance), compile=False)
            point = _measure(
                pipe, tolerance, ((draw(*job), reference) for job, reference in zip(jobs, references, strict=True))
            )
            bar.set_postfix_str(f"{point.speedup:.2f}x, {point.psnr:.1f} dB")
            return point

        try:
            curve = search(measure, target_speedup=target_speedup, target_psnr=target_psnr)
        finally:
            if bound_runtime(pipe.transformer) is not None:
                restore_pipeline(pipe)
    best = choose(curve, target_speedup=target_speedup, target_psnr=target_psnr)
    found = Calibration(target_speedup=target_speedup, target_psnr=target_psnr, images=len(jobs), curve=tuple(curve))
    return dataclasses.replace(_at(pipe, config, best.tolerance), calibration=found)


def search(
    measure: Callable[[float], CurvePoint], *, target_speedup: float | None = None, target_psnr: float | None = None
) -> list[CurvePoint]:
    """Measure tolerances until the target lies close to one or between two neighbours; by rising tolerance.

    Speed rises and quality falls with the tolerance, but both in jumps and not strictly: so the bracket is halved, in the
    logarithm, and nothing is interpolated.
    """

    def goes_beyond(point: CurvePoint) -> bool:
        return point.speedup >= target_speedup if target_speedup is not None else point.psnr < (target_psnr or 0.0)

    points = [measure(FIRST)]
    low, high = SMALLEST, LARGEST
    step = 4.0
    while len(points) < _MOST_POINTS and not _is_close(points, target_speedup, target_psnr):
        newest = points[-1]
        low, high = (low, newest.tolerance) if goes_beyond(newest) else (newest.tolerance, high)
        is_bracketed = any(map(goes_beyond, points)) and not all(map(goes_beyond, points))
        if high / low < _FINEST:
            break
        if is_bracketed:
            tolerance = math.sqrt(low * high)
        elif goes_beyond(newest):
            tolerance = max(SMALLEST, newest.tolerance / step)
        else:
            tolerance = min(LARGEST, newest.tolerance * step)
        points.append(measure(tolerance))
    return sorted(points, key=lambda point: point.tolerance)


def choose(curve: Sequence[CurvePoint], *, target_speedup: float | None = None, target_psnr: float | None = None) -> CurvePoint:
    """The best of the points that are fast enough, or the fastest of those that are good enough.

    Raises:
        ValueError: none is; the message says what can be reached.

    """
    if target_speedup is not None:
        enough = [point for point in curve if point.speedup >= target_speedup]
        if enough:
            return max(enough, key=lambda point: (point.psnr, point.speedup))
        most = max(curve, key=lambda point: point.speedup)
        raise ValueError(
            f"target_speedup={target_speedup:g} is not reached: {most.speedup:.2f}x fewer block evaluations at most, at "
            f"{most.psnr:.1f} dB and tolerance {most.tolerance:.4g}. Ask for less, or take more steps."
        )
    enough = [point for point in curve if target_psnr is not None and point.psnr >= target_psnr]
    if enough:
        return max(enough, key=lambda point: (point.speedup, point.psnr))
    best = max(curve, key=lambda point: point.psnr)
    raise ValueError(
        f"target_psnr={target_psnr:g} is not reached: {best.psnr:.1f} dB at most, at {best.speedup:.2f}x and tolerance "
        f"{best.tolerance:.4g}. Ask for less; tolerance 0 computes every step."
    )


def _is_close(points: list[CurvePoint], target_speedup: float | None, target_psnr: float | None) -> bool:
    """Whether a point meets the target, and hardly more."""
    if target_speedup is not None:
        return any(target_speedup <= point.speedup <= target_speedup * (1 + _CLOSE) for point in points)
    assert target_psnr is not None
    return any(target_psnr <= point.psnr <= target_psnr * (1 + _CLOSE) for point in points)


def _measure(pipe: Any, tolerance: float, pairs: Iterator[tuple[Any, Any]]) -> CurvePoint:
    quality, ran, uncached = [], 0, 0
    for image, reference in pairs:
        quality.append(min(psnr(image, reference), EQUAL_PSNR))
        run = report(pipe)
        ran += run.block_evaluations + run.mlp_evaluations
        uncached += run.block_evaluations_uncached
    return CurvePoint(tolerance=tolerance, speedup=uncached / ran, psnr=statistics.mean(quality), worst_psnr=min(quality))


def _at(pipe: Any, config: CacheConfig | None, tolerance: float) -> CacheConfig:
    if config is not None:
        return at_tolerance(config, tolerance)
    return resolve_config(tolerance=tolerance, draws_videos=draws_videos(pipe))


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """No progress bars of the pipeline's own inside the block."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def _check(
    pipe: Any,
    prompts: Sequence[str],
    target_speedup: float | None,
    target_psnr: float | None,
    config: CacheConfig | None,
    seed: int,
    progress: bool,
    options: dict[str, Any],
) -> None:
    check_targets(target_speedup, target_psnr)
    check_integer("seed", seed, 0, 2**63 - 1)
    check_flag("progress", progress)
    if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts must be a list of at least one prompt, got {prompts!r}.")
    if "num_inference_steps" in options:
        check_integer("num_inference_steps", options["num_inference_steps"], 1, 2**31 - 1)
    own = [name for name in _OWN_OPTIONS if name in options]
    if own:
        raise ValueError(f"{', '.join(own)} cannot be given to calibrate, which sets it itself: one image a prompt, by `seed`.")
    if config is not None and not isinstance(config, CacheConfig):
        raise TypeError(f"config must be an afcache.CacheConfig, got {type(config).__name__}.")
    if config is not None and not config.rule.is_error_controlled:
        raise ValueError(f"config must have policy 'adaptive', whose tolerance is searched, got {config.policy!r}.")
    if bound_runtime(pipe.transformer) is not None:
        raise ValueError("pipe is cached already. Call afcache.restore_pipeline(pipe) first; calibration starts uncached.")
