"""What a scheduler makes of the model's outputs, found by a dry run of a copy of it before the first step."""

import copy
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afcache.functional.solver_response import WINDOW
from afcache.runtime.scheduler import ScheduledStep

# Solvers compute in float32; a nonlinear one is off by its whole effect.
_ROUNDING = 1e-4


class _Known(NamedTuple):
    """What was found for a schedule."""

    schedule: ScheduledStep
    response: Tensor | None


# Experts that share a schedule begin at different steps of it, and a scheduler can be asked before its first step alone.
_known: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()


def response_of(scheduler: Any, step: ScheduledStep) -> Tensor | None:
    """What each of the last outputs weighs in the latents after each step: `[steps, WINDOW]`, the newest output's first.

    The scheduler is not touched: a copy of it walks the schedule with unit vectors for the sample and for each output, and
    again with random numbers, which shows whether it is linear. Both happen once for each schedule.

    Args:
        scheduler: of a kind that draws no noise.
        step: where it stands.

    Returns:
        a row for each step of the schedule, 0 before the first that is walked; float32, on the CPU. None where the solver is
        not linear, or nobody asked before its first step.
    Cost:
        two walks over numbers: milliseconds.

    """
    known = _known.get(scheduler)
    if known is not None and step.is_of(known.schedule):
        return known.response
    if scheduler.step_index not in (None, scheduler.begin_index):
        return None
    found = _measure(scheduler, step.index)
    _known[scheduler] = _Known(step, found)
    return found


def _measure(scheduler: Any, begin: int) -> Tensor | None:
    count = len(scheduler.timesteps) - begin
    weights = _walk(scheduler, begin, torch.eye(count + 1, dtype=torch.float64))
    numbers = torch.randn(count + 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (walked,) = _walk(scheduler, begin, numbers)
    difference = (weights * numbers).sum(0) - walked
    if not bool(difference.abs().max() <= _ROUNDING):
        return None
    rows = torch.zeros(begin + count, WINDOW)
    for index in range(count):
        # The first is the sample's own weight.
        mine = weights[1 : index + 2, index].flip(0)[:WINDOW]
        rows[begin + index, : len(mine)] = mine.to(torch.float32)
    return rows


def _walk(scheduler: Any, begin: int, values: Tensor) -> Tensor:
    """Latents after every step, `[channels, steps]`, of a sample and outputs that are `values [1 + steps, channels]`."""
    walker = copy.deepcopy(scheduler)
    walker.timesteps, walker.sigmas, walker._step_index = scheduler.timesteps.cpu(), scheduler.sigmas.cpu(), None
    walker.set_begin_index(begin)
    x, after = values[0].reshape(1, -1, 1, 1), []
    for timestep, output in zip(walker.timesteps[begin:], values[1:], strict=True):
        # Of the class: somebody may have put another in its place, which would step the original.
        x = type(walker).step(walker, output.reshape(1, -1, 1, 1), timestep, x, return_dict=False)[0]
        after.append(x.flatten().to(torch.float64))
    return torch.stack(after, dim=1)
