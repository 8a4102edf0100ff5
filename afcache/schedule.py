"""Reading the noise schedule from a diffusers scheduler, in float32, at call time.

The `timestep` argument of the transformer cannot be used: pipelines cast it to the latents' dtype, and in bfloat16 the gaps
in sigma are then wrong by up to 22 % at 28 steps and 75 % at 50.
"""

import weakref
from typing import Any, NamedTuple

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

_MULTISTEP = (DPMSolverMultistepScheduler, UniPCMultistepScheduler)
_SUPPORTED = "FlowMatchEulerDiscreteScheduler, and DPMSolverMultistepScheduler or UniPCMultistepScheduler with flow sigmas"


class ScheduledStep(NamedTuple):
    """A position in a schedule.

    Attributes:
        timesteps: the scheduler's own tensor; its identity names the trajectory, because `set_timesteps` makes a new one.
        sigmas: noise levels, one more than steps.
        index: the step that is about to be taken.

    """

    timesteps: Tensor
    sigmas: Tensor
    index: int


class Served:
    """A pipeline whose scheduler is read at every call; when the pipeline is gone, its last scheduler still counts."""

    def __init__(self, pipe: Any) -> None:
        self._reference = weakref.ref(pipe)
        # A pipeline that is being deep-copied has no scheduler yet.
        self._scheduler = getattr(pipe, "scheduler", None)

    @property
    def pipe(self) -> Any:
        """The pipeline, or None."""
        return self._reference()

    @property
    def scheduler(self) -> Any:
        """The pipeline's present scheduler."""
        pipe = self._reference()
        if pipe is not None:
            self._scheduler = pipe.scheduler
        return self._scheduler


def check_scheduler(scheduler: Any) -> None:
    """Raise unless we know what the scheduler's step does.

    Raises:
        NotImplementedError: any other scheduler; the message lists the supported ones.

    """
    if _has_step_of(scheduler, FlowMatchEulerDiscreteScheduler):
        return
    is_multistep = any(_has_step_of(scheduler, kind) for kind in _MULTISTEP)
    if is_multistep and scheduler.config.get("use_flow_sigmas", False):
        return
    name = type(scheduler).__name__
    raise NotImplementedError(
        f"scheduler {name} is not supported; caching knows {_SUPPORTED}. Assign one of them to pipe.scheduler, or call "
        "afcache.restore_pipeline(pipe) to run without caching."
    )


def correction_holds(scheduler: Any) -> bool:
    """Whether the next latents are x + (sigma_next - sigma) v: what the catch-up correction assumes."""
    is_euler = _has_step_of(scheduler, FlowMatchEulerDiscreteScheduler)
    return is_euler and not scheduler.config.get("stochastic_sampling", False)


def _has_step_of(scheduler: Any, kind: type) -> bool:
    """Whether the scheduler is of this kind and did not replace its step."""
    return isinstance(scheduler, kind) and getattr(type(scheduler), "step", None) is kind.step  # pyright: ignore


def read_step(scheduler: Any, timestep: Tensor, *, verify: bool) -> ScheduledStep | None:
    """Find the step that `timestep` belongs to.

    Args:
        scheduler: a supported scheduler.
        timestep: the transformer's argument `[batch]`, in [0, 1].
        verify: compare it with the schedule; reads the device.

    Returns:
        the step, or None where timestep and schedule disagree or the schedule is at its end.

    Raises:
        ValueError: two steps of the schedule have the same sigma.

    """
    timesteps, sigmas = scheduler.timesteps, scheduler.sigmas
    if scheduler.step_index is not None:
        index = scheduler.step_index
    elif scheduler.begin_index is not None:
        index = scheduler.begin_index
    else:
        index = int((timesteps.to(timestep.device) - timestep.flatten()[0].float() * 1000).abs().argmin())
    if index >= len(timesteps) or index + 1 >= len(sigmas):
        return None
    if verify and not _agrees(timestep, timesteps[index]):
        return None
    return ScheduledStep(timesteps, sigmas, index)


def check_sigmas(sigmas: Tensor) -> None:
    """Raise where two neighbouring noise levels are equal: forecasts divide by their distance.

    Raises:
        ValueError: with the first such step.

    """
    repeated = (sigmas[1:] == sigmas[:-1]).nonzero()
    if len(repeated):
        step = int(repeated[0])
        raise ValueError(
            f"scheduler.sigmas repeats {float(sigmas[step]):.6g} at steps {step} and {step + 1}; caching needs distinct noise "
            "levels. Use another schedule, or afcache.restore_pipeline(pipe)."
        )


def _agrees(timestep: Tensor, expected: Tensor) -> bool:
    """Whether every sample's timestep is the scheduled one, up to the rounding of its dtype."""
    rounding = torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 0.0
    difference = (timestep.to(torch.float32) * 1000 - expected.to(timestep.device, torch.float32)).abs().max()
    return float(difference) <= 2 * rounding * float(expected) + 1e-2
