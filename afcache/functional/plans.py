"""Refreshes that are known before a trajectory starts: warmup, fixed and growing intervals, MagCache's calibrated schedule.

They depend on no feature, so all samples share them, and ranks agree for free. A plan enters the step as one 0-d tensor.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from afcache.functional.process import Process
from afcache.functional.state import StepSchedule
from afcache.settings.changes import OPEN
from afcache.settings.config import CacheConfig
from afcache.settings.rules import PolicyName

# The calibrated step that MagCache's authors always compute, of 28.
_MAGCACHE_FORCED = 11 / 28
# Where a step is a tenth of the way or more, an error measured on the first two says too little of a third.
_FEW_STEPS, _FEW_WARMUP = 10, 3
# Tolerances are those of schedules with as many steps, or more; see `tolerance_scale`.
_MANY_STEPS = 16


def schedule_steps(
    sigmas: Tensor,
    config: CacheConfig,
    *,
    noise_floor: float | None = None,
    each: Sequence[CacheConfig] | None = None,
    responses: Tensor | None = None,
    processes: Sequence[Process] | None = None,
) -> list[StepSchedule]:
    """Take a trajectory's schedule apart into its steps, once, so that no step has to make tensors of numbers.

    Args:
        sigmas: noise levels, one more than steps; `[steps + 1]`; used in float32.
        config: settings.
        noise_floor: as measured; None takes that of `config`, and 0 where it has none.
        each: settings of each sample, which are `config` but for the fields of `afcache.settings.changes.OPEN`; None takes
            those of `config` for all, as 0-d tensors.
        responses: what the last outputs weigh in the latents after each step, newest first, `[steps, window]`; None under
            Euler's step.
        processes: of each step, of a model that is no flow's; None of a flow.

    """

    def setting(name: str) -> Tensor:
        value = getattr(config, name) if each is None else [getattr(one, name) for one in each]
        return torch.tensor(value, dtype=torch.float32, device=sigmas.device)

    num_steps = len(sigmas) - 1
    # Each level has memory of its own: views of one tensor would be misaligned inputs of a compiled step.
    levels = [sigma.clone() for sigma in sigmas.to(torch.float32).unbind()]
    indices = [index.clone() for index in torch.arange(num_steps, device=sigmas.device).unbind()]
    forced = [flag.clone() for flag in torch.tensor(forced_steps(config, num_steps), device=sigmas.device).unbind()]
    chosen = {name: setting(name) for name in OPEN}
    if config.rule.is_error_controlled:
        chosen["tolerance"] = chosen["tolerance"] * tolerance_scale(sigmas)
    weights = None if responses is None else [row.clone() for row in responses.to(sigmas.device, torch.float32).unbind()]
    floor = torch.tensor(noise_floor or config.noise_floor or 0.0, dtype=torch.float32, device=sigmas.device)
    return [
        StepSchedule(
            sigma=levels[i],
            sigma_next=levels[i + 1],
            step_index=indices[i],
            is_forced=forced[i],
            **chosen,
            noise_floor=floor,
            response=None if weights is None else weights[i],
            process=None if processes is None else processes[i],
        )
        for i in range(num_steps)
    ]


def stack_steps(steps: Sequence[StepSchedule]) -> StepSchedule:
    """Several steps as one: every field has a leading axis of steps. What decides nothing is left out: response and process."""
    bare = (step._replace(response=None, process=None) for step in steps)
    fields = ([value for value in values if value is not None] for values in zip(*bare, strict=True))
    return StepSchedule(*(torch.stack(values) if values else None for values in fields))  # pyright: ignore[reportArgumentType]


def tolerance_scale(sigmas: Tensor) -> Tensor:
    """How many times the tolerance a run of forecast steps may add on a schedule of long steps: 1 from 16 steps on.

    max(1, 16 |sigma_0 - sigma_N| / N)

    A run and the refresh that ends it take two steps at least. So few steps make few runs, whose errors are all that there is
    to add up: with as much for each as among many, the whole would come out better than it was asked to. Part of a schedule
    (image to image) has steps as short as those of the whole. (Solvers know this as control of the error per unit step.)

    Args:
        sigmas: noise levels of the N steps that are walked, one more than steps; `[steps + 1]`.

    Returns:
        0-d, float32, on the device of `sigmas`, which is not waited for.

    """
    way = (sigmas[0] - sigmas[-1]).to(torch.float32).abs()
    return (way * _MANY_STEPS / (len(sigmas) - 1)).clamp(min=1.0)


def forced_steps(config: CacheConfig, num_steps: int) -> list[bool]:
    """Whether each step must be computed whatever is seen: its warmup, what its policy plans, a last step asked for.

    "adaptive" computes three of ten steps or fewer at the start: after two, a third one is forecast badly, and early.
    """
    is_short = config.rule.is_error_controlled and num_steps <= _FEW_STEPS
    warmup = max(config.warmup_steps, _FEW_WARMUP) if is_short else config.warmup_steps
    forced = [step < warmup for step in range(num_steps)]
    plan = _PLANS.get(config.policy)
    for step in () if plan is None else plan(config, num_steps):
        if step < num_steps:
            forced[step] = True
    if config.refresh_last_step:
        forced[-1] = True
    return forced


def growing_plan(num_steps: int, *, first: int, interval: int, growth: float) -> list[int]:
    """Refresh at distances floor(interval + k * growth), k = 0, 1, ...: Spectrum's adaptive schedule.

    Args:
        num_steps: of the trajectory.
        first: the step from which distances are counted.
        interval: the first distance.
        growth: alpha, what each refresh adds to it.

    Returns:
        the steps to refresh.
    Reference:
        Spectrum, 2026, arXiv 2603.01623.

    """
    steps, distance = [first], float(interval)
    while steps[-1] < num_steps:
        steps.append(steps[-1] + int(distance))
        distance += growth
    return steps[:-1]


def magnitude_plan(
    num_steps: int, ratios: Sequence[float], *, threshold: float, max_cached_steps: int | None = None
) -> list[int]:
    """MagCache: cache while the accumulated change of the residual's norm, known from a calibration, stays small.

    a_i = prod ratios since the last refresh;  error = sum |1 - a_i|;  cached iff error <= threshold

    The first tenth of the steps and the calibrated step 11 of 28 are always computed, as the authors do; diffusers' version
    leaves the latter out. A threshold of 0 computes every step.

    Args:
        num_steps: of the trajectory.
        ratios: one for each calibrated step; the nearest is taken where the number of steps differs.
        threshold: largest accumulated error.
        max_cached_steps: longest run of cached steps; None means no limit.

    Returns:
        the steps to refresh.
    Reference:
        Ma et al., 2025, MagCache, arXiv 2506.09045.

    """
    resampled = resample_ratios(ratios, num_steps)
    limit = num_steps if max_cached_steps is None else max_cached_steps
    forced = round(_MAGCACHE_FORCED * num_steps) if len(ratios) > 1 else -1
    refreshes, product, error, run = [], 1.0, 0.0, 0
    for step in range(num_steps):
        product *= resampled[step]
        error += abs(1 - product)
        is_early = step < (num_steps + 9) // 10
        if not is_early and step != forced and threshold > 0 and error <= threshold and run < limit:
            run += 1
        else:
            refreshes.append(step)
            product, error, run = 1.0, 0.0, 0
    return refreshes


def resample_ratios(ratios: Sequence[float], num_steps: int) -> list[float]:
    """Nearest-neighbour interpolation of calibrated ratios to another number of steps."""
    if num_steps == 1:
        return [ratios[-1]]
    scale = (len(ratios) - 1) / (num_steps - 1)
    return [ratios[round(step * scale)] for step in range(num_steps)]


# The refreshes of every policy that is a plan, `(config, num_steps) -> steps`.
_PLANS: dict[PolicyName, Callable[[CacheConfig, int], Sequence[int]]] = {
    "fixed": lambda config, num_steps: range(config.warmup_steps - 1, num_steps, config.interval),
    "growing": lambda config, num_steps: growing_plan(
        num_steps, first=config.warmup_steps - 1, interval=config.interval, growth=config.interval_growth
    ),
    "magcache": lambda config, num_steps: magnitude_plan(
        num_steps, config.magnitude_ratios, threshold=config.threshold, max_cached_steps=config.max_cached_steps
    ),
    "planned": lambda config, num_steps: config.refresh_steps,
    "none": lambda config, num_steps: range(num_steps),
}
