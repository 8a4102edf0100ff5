"""What a scheduler makes of the model's outputs, found before its first step by a dry run of another one of its settings."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afcache.functional.solver_response import WINDOW
from afcache.runtime.scheduler import ScheduledStep, begins

# Relative to the terms of a sum: solvers compute in float32; a nonlinear one is off by its whole effect.
_ROUNDING = 1e-5
# Of the answers to an error of 1; those of an unstable solver grow without bound.
_LARGEST = 200.0
# What a schedule is made of, by the names that schedulers have for it: `set_timesteps` makes it, or users put other betas in.
_SCHEDULE = {"timesteps", "sigmas", "num_inference_steps", "order_list", "alphas_cumprod", "final_alpha_cumprod"}


class _Known(NamedTuple):
    """What was found for a schedule.

    Attributes:
        step: the first that is walked.
        config: of the scheduler.
        levels: noise levels and timesteps, as they were.
        response: what was found.

    """

    step: ScheduledStep
    config: dict[str, Any]
    levels: tuple[Tensor, Tensor]
    response: Tensor | None

    def is_of(self, step: ScheduledStep, config: dict[str, Any]) -> bool:
        """Whether another schedule is walked alike: images one after the other mostly are."""
        given = (step.sigmas, step.timesteps)
        is_alike = self.step.index == step.index and self.config == config
        return is_alike and all(torch.equal(known, value.cpu()) for known, value in zip(self.levels, given, strict=True))


# Experts that share a schedule begin at different steps of it, and only before its first step is it known where that was.
_known: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()


def response_of(scheduler: Any, step: ScheduledStep) -> Tensor | None:
    """What each of the last outputs weighs in the latents after each step: `[steps, WINDOW]`, the newest output's first.

    The scheduler is not touched: another one of its settings walks the schedule with unit vectors for the sample and for each
    output, and again with random numbers, which shows whether it is linear. Both happen once for each schedule.

    Args:
        scheduler: of a kind that draws no noise.
        step: where it stands.

    Returns:
        a row for each step of the schedule, 0 before the first that is walked; float32, on the CPU. None where the solver is
        not linear, its answers would grow from step to step, or nobody asked before its first step.
    Cost:
        two walks over numbers, a tenth of a second for 50 steps; nothing where the last image's schedule was the same.

    """
    known = _known.get(scheduler)
    is_first = begins(scheduler)
    if known is not None and step.is_of(known.step) and (not is_first or known.step.index == step.index):
        return known.response
    if not is_first:
        return None
    config = dict(scheduler.config)
    if known is not None and known.is_of(step, config):
        _known[scheduler] = known._replace(step=step)
        return known.response
    with torch.device("cpu"):
        found = _measure(scheduler, step.index)
    _known[scheduler] = _Known(step, config, (step.sigmas.cpu().clone(), step.timesteps.cpu().clone()), found)
    return found


def _measure(scheduler: Any, begin: int) -> Tensor | None:
    count = len(scheduler.timesteps) - begin
    weights = _walk(scheduler, begin, torch.eye(count + 1, dtype=torch.float64))
    generator = torch.Generator("cpu").manual_seed(0)
    numbers = torch.randn(count + 1, 1, dtype=torch.float64, generator=generator)
    (walked,) = _walk(scheduler, begin, numbers)
    terms = weights * numbers
    difference, size = terms.sum(0) - walked, terms.abs().sum(0)
    if not bool((difference.abs() <= _ROUNDING * size).all()) or not _is_stable(weights[1:].T):
        return None
    rows = torch.zeros(begin + count, WINDOW)
    for index in range(count):
        # The first is the sample's own weight.
        mine = weights[1 : index + 2, index].flip(0)[:WINDOW]
        rows[begin + index, : len(mine)] = mine.to(torch.float32)
    return rows


def _is_stable(weights: Tensor) -> bool:
    """Whether what undoes one output's error at every later step stays small: `weights [steps, outputs]`, lower triangular."""
    identity = torch.eye(len(weights), dtype=weights.dtype)
    answers = torch.linalg.solve_triangular(weights, identity, upper=False) * weights.diagonal()
    return bool(answers.abs().max() <= _LARGEST)


def _walk(scheduler: Any, begin: int, values: Tensor) -> Tensor:
    """Latents after every step, `[channels, steps]`, of a sample and outputs that are `values [1 + steps, channels]`."""
    # A new one remembers nothing, and nobody has put anything into it.
    walker = type(scheduler).from_config(scheduler.config)
    for name in _SCHEDULE & vars(scheduler).keys():
        value = getattr(scheduler, name)
        setattr(walker, name, value.cpu() if isinstance(value, Tensor) else value)
    if hasattr(walker, "set_begin_index"):
        walker.set_begin_index(begin)
    x, after = values[0].reshape(1, -1, 1, 1), []
    for timestep, output in zip(walker.timesteps[begin:], values[1:], strict=True):
        x = walker.step(output.reshape(1, -1, 1, 1), timestep, x, return_dict=False)[0]
        after.append(x.flatten().to(torch.float64))
    return torch.stack(after, dim=1)
