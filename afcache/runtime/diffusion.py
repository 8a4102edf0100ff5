"""The schedules of models that are no flow's, in the terms that the cache has for flows: noise levels that fall from 1 to 0.

Betas say of a step what part of the latents is noise: phi = arctan(s / alpha), a right angle where all is. The noise level is
2 / pi phi: along it the path is as a flow's, whatever the model predicts (`afcache.functional.process`).
"""

import math
import weakref
from typing import Any, NamedTuple

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from afcache._typing import Sigmas
from afcache.functional.process import Process, from_numbers
from afcache.functional.target import NOISE_LEVEL
from afcache.runtime.switches import version_of

_PREDICTIONS = ("epsilon", "v_prediction")
ONE_STEP = (DDIMScheduler, CogVideoXDDIMScheduler)
SOLVERS = (DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, UniPCMultistepScheduler)
# The direction in which the history keeps noise: (1 - tau) x_0 + tau n.
_BEYOND = math.atan2(NOISE_LEVEL, 1 - NOISE_LEVEL)


class _Read(NamedTuple):
    """A schedule as it was read; the tensors name it.

    Attributes:
        timesteps, sigmas, version: the scheduler's own; None where it has none.
        levels: noise levels.

    """

    timesteps: Tensor
    sigmas: Tensor | None
    version: int | None
    levels: Sigmas


_read: weakref.WeakKeyDictionary[Any, _Read] = weakref.WeakKeyDictionary()


def is_diffusion(scheduler: Any) -> bool:
    """Whether it steps latents whose variance is kept, by a model that predicts noise or its difference to a clean image."""
    if scheduler.config.get("use_flow_sigmas", False) or scheduler.config.get("prediction_type") not in _PREDICTIONS:
        return False
    return isinstance(scheduler, (*ONE_STEP, *SOLVERS, CogVideoXDPMScheduler))


def levels_of(scheduler: Any) -> Sigmas:
    """Noise levels `[steps + 1]` of its schedule, float32, on the CPU: the very same tensor until the schedule is another.

    Args:
        scheduler: for which `is_diffusion`.
    Cost:
        waits for the device, once for each schedule.

    """
    timesteps, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", None)
    version = None if sigmas is None else version_of(sigmas)
    known = _read.get(scheduler)
    if known is None or known.timesteps is not timesteps or known.sigmas is not sigmas or known.version != version:
        angles, after = _angles(scheduler)
        levels = torch.cat([angles, after[-1:]]) * (2 / math.pi)
        known = _Read(timesteps, sigmas, version, levels.to(torch.float32))
        _read[scheduler] = known
    return known.levels


def processes_of(scheduler: Any, begin: int, device: torch.device) -> list[Process]:
    """What its steps do, from step `begin` on."""
    angles, after = _angles(scheduler)
    find = _of_noise if scheduler.config.prediction_type == "epsilon" else _of_difference
    return from_numbers([find(now, then) for now, then in zip(angles.tolist(), after.tolist(), strict=True)][begin:], device)


def _of_noise(now: float, then: float) -> tuple[float, ...]:
    kept = math.cos(then) / math.cos(now)
    return kept, math.sin(then) - math.sin(now) * kept, 0.0, 1.0, -math.sin(now), math.cos(now)


def _of_difference(now: float, then: float) -> tuple[float, ...]:
    return math.cos(now - then), -math.sin(now - then), math.cos(_BEYOND - now), math.sin(_BEYOND - now), 0.0, 1.0


def _angles(scheduler: Any) -> tuple[Tensor, Tensor]:
    """Phi = arctan(s / alpha) before and after every step, float64 `[steps]`."""
    if isinstance(scheduler, SOLVERS):
        angles = torch.atan(scheduler.sigmas.cpu().double())
        return angles[:-1], angles[1:]
    products = scheduler.alphas_cumprod.cpu().double()
    timesteps = scheduler.timesteps.cpu().long()
    # It steps by as many as there are of, whether or not the next timestep is that far away.
    earlier = timesteps - scheduler.config["num_train_timesteps"] // scheduler.num_inference_steps
    last = torch.as_tensor(scheduler.final_alpha_cumprod).cpu().double()
    reached = torch.where(earlier >= 0, products[earlier.clamp(min=0)], last)
    return torch.atan(_ratio(products[timesteps])), torch.atan(_ratio(reached))


def _ratio(product: Tensor) -> Tensor:
    """The tangent of phi, from alpha^2."""
    return ((1 - product).clamp(min=0) / product).sqrt()
