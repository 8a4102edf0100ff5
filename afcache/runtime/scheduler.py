"""Reading the noise schedule from a diffusers scheduler, in float32, at call time.

The `timestep` argument of the transformer cannot be used: pipelines cast it to the latents' dtype, and in bfloat16 the gaps
in sigma are then wrong by up to 22 % at 28 steps and 75 % at 50.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import CogVideoXDPMScheduler, FlowMatchLCMScheduler
from jaxtyping import Float
from torch import Tensor

from afcache._typing import Sigmas
from afcache.models.family import Clock
from afcache.models.schedulers import EULERS
from afcache.runtime.diffusion import ONE_STEP, SOLVERS, is_diffusion, levels_of
from afcache.runtime.switches import version_of

_OF_FLOWS = (*EULERS, FlowMatchLCMScheduler)
_SUPPORTED = (
    f"FlowMatchEulerDiscreteScheduler, {', '.join(kind.__name__ for kind in SOLVERS)} (with use_flow_sigmas=True, or where the "
    f"model predicts noise or v), and {' and '.join(kind.__name__ for kind in ONE_STEP)} of such models"
)


# How the noise levels of models that are no flow's are called in errors, and what makes their last two distinct.
_LEVELS = "the noise level of scheduler, 2 / pi arctan(s / alpha),"
_OTHER_ENDS = " (with set_alpha_to_one=True, steps_offset=1, or final_sigmas_type='zero')"


class ScheduledStep(NamedTuple):
    """A position in a schedule.

    Attributes:
        timesteps: the scheduler's own tensor; its identity names the trajectory, because `set_timesteps` makes a new one.
        sigmas: noise levels, one more than steps; the scheduler's own tensor, too, or of a model that is no flow's always the
            same that was made of it.
        index: the step that is about to be taken.
        version: of the noise levels, counted up by edits in place.

    """

    timesteps: Float[Tensor, " steps"]
    sigmas: Sigmas
    index: int
    version: int | None = None

    def is_of(self, other: "ScheduledStep") -> bool:
        """Whether both are steps of one schedule, which nobody has edited between them."""
        is_same = self.timesteps is other.timesteps and self.sigmas is other.sigmas
        return is_same and self.version == other.version


def check_scheduler(scheduler: Any, *, forecasts: bool = True, is_flow: bool | None = None) -> None:
    """Raise unless we know what the scheduler's step does, and a forecast is worth something under it.

    Where every step draws new noise n (stochastic sampling, LCM), x_{i+1} = (1 - sigma_{i+1}) (x_i - sigma_i v_i) +
    sigma_{i+1} n. The velocity n - x_0 follows that noise, and whatever is remembered of earlier steps holds earlier noise: on
    the model that ships the relative error of a forecast is 0.8 to 1.2 however near the last refresh is, and images fall to
    15 dB. What does carry over is the prediction of x_0; but to reuse it at a step is the same as leaving that step out of
    the schedule. So there is no error model to switch to: fewer steps are the cache.

    Args:
        scheduler: of a pipeline.
        forecasts: whether any step is forecast; not under policy "none".
        is_flow: whether the model is a flow, or predicts noise or v; None: nobody knows.

    Raises:
        NotImplementedError: any other scheduler, one of the other kind of models, or new noise at every step; the message says
            what to use.

    """
    name = type(scheduler).__name__
    mixes = _has_step_of(scheduler, SOLVERS)
    is_known = _has_step_of(scheduler, (*_OF_FLOWS, CogVideoXDPMScheduler))
    is_known = is_known or (mixes and scheduler.config.get("use_flow_sigmas", False))
    if is_known or (_has_step_of(scheduler, (*SOLVERS, *ONE_STEP)) and is_diffusion(scheduler)):
        if is_flow is not None and is_flow == is_diffusion(scheduler):
            raise NotImplementedError(_of_other_kind(scheduler, is_flow=is_flow))
        if forecasts and _draws_noise(scheduler):
            raise NotImplementedError(
                f"scheduler {name} as configured draws new noise at every step, so that nothing remembered of earlier steps "
                "forecasts the next. Turn that off (stochastic_sampling=False, algorithm_type='dpmsolver++', or another one: "
                "FlowMatchEulerDiscreteScheduler for LCM, CogVideoXDDIMScheduler for CogVideoXDPMScheduler), take fewer steps "
                "without a cache (afcache.restore_pipeline(pipe)), or compute every step with CacheConfig(policy='none')."
            )
        return
    raise NotImplementedError(
        f"scheduler {name} is not supported; caching knows {_SUPPORTED}. Assign one of them to pipe.scheduler, or call "
        "afcache.restore_pipeline(pipe) to run without caching."
    )


def _of_other_kind(scheduler: Any, *, is_flow: bool) -> str:
    name, predicts = type(scheduler).__name__, scheduler.config.get("prediction_type")
    if is_flow:
        return (
            f"scheduler {name} has prediction_type={predicts!r}, and the transformer is a flow, whose velocity it would take "
            f"for that. Use {name}.from_config(pipe.scheduler.config, use_flow_sigmas=True, "
            "prediction_type='flow_prediction'), or the scheduler that the pipeline came with."
        )
    return (
        f"scheduler {name} takes what it is given for a flow's velocity, and the transformer predicts noise or v. Assign the "
        "scheduler that the pipeline came with to pipe.scheduler."
    )


def check_beside(name: str, beside: Any, scheduler: Any) -> None:
    """Raise unless what is drawn beside the sample takes Euler's steps as the sample does, as many.

    Args:
        name: of its scheduler in the pipeline.
        beside: that scheduler, or None.
        scheduler: the sample's.

    Raises:
        NotImplementedError: it does not.

    """
    if beside is None or not (is_eulers(beside) and is_eulers(scheduler)) or len(beside.sigmas) != len(scheduler.sigmas):
        found = "missing" if beside is None else f"a {_with_steps(beside)}"
        raise NotImplementedError(
            f"{name} is {found} beside scheduler {_with_steps(scheduler)}; what is drawn on a schedule of its own is cached "
            "where both take Euler's steps, as many. Assign the schedulers that the pipeline came with, or call "
            "afcache.restore_pipeline(pipe) to run without caching."
        )


def _with_steps(scheduler: Any) -> str:
    return f"{type(scheduler).__name__} of {len(scheduler.timesteps)} steps"


def is_eulers(scheduler: Any) -> bool:
    """Whether the next latents are x + (sigma_next - sigma) v, so that nothing is remembered of earlier velocities."""
    return _has_step_of(scheduler, EULERS) and not _draws_noise(scheduler)


def is_solver(scheduler: Any) -> bool:
    """Whether the next latents may mix several velocities, without any noise: what `afcache.runtime.solver` looks into."""
    return _has_step_of(scheduler, (*SOLVERS, *ONE_STEP)) and not _draws_noise(scheduler)


def begins(scheduler: Any) -> bool:
    """Whether it has taken no step yet; one that counts none is as it was before its first."""
    index = getattr(scheduler, "step_index", None)
    return index is None or index == scheduler.begin_index


def noise_levels(scheduler: Any) -> Sigmas:
    """Noise levels of its schedule, always the same tensor until the schedule is another."""
    return levels_of(scheduler) if is_diffusion(scheduler) else scheduler.sigmas


def _draws_noise(scheduler: Any) -> bool:
    """Whether each step draws new noise."""
    if isinstance(scheduler, FlowMatchLCMScheduler | CogVideoXDPMScheduler):
        return True
    is_sde = str(scheduler.config.get("algorithm_type", "")).startswith("sde-")
    return is_sde or scheduler.config.get("stochastic_sampling", False)


def _has_step_of(scheduler: Any, kinds: tuple[Any, ...]) -> bool:
    """Whether the scheduler is of one of these kinds and did not replace its step."""
    return any(isinstance(scheduler, kind) and type(scheduler).step is kind.step for kind in kinds)


def read_step(
    scheduler: Any, timestep: Tensor, clock: Clock, *, verify: bool | Callable[[ScheduledStep], bool]
) -> ScheduledStep | None:
    """Find the step that `timestep` belongs to.

    Args:
        scheduler: a supported scheduler.
        timestep: the transformer's argument.
        clock: what it counts.
        verify: compare it with the schedule, or whether to do so once the step is known; reads the device.

    Returns:
        the step, or None where timestep and schedule disagree or the schedule is at its end.

    Raises:
        ValueError: two steps of the schedule have the same sigma.
    Cost:
        waits for the device where the scheduler does not count its steps, too.

    """
    timesteps, sigmas = scheduler.timesteps, noise_levels(scheduler)
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = getattr(scheduler, "begin_index", None)
    if index is None:
        index = int((timesteps.to(timestep.device) - clock.read(timestep)[0]).abs().argmin())
    if index >= len(timesteps) or index + 1 >= len(sigmas):
        return None
    step = ScheduledStep(timesteps, sigmas, index, version_of(sigmas))
    is_doubtful = verify if isinstance(verify, bool) else verify(step)
    return None if is_doubtful and not _agrees(timestep, clock, timesteps[index]) else step


def check_sigmas(sigmas: Tensor, *, is_flow: bool = True) -> None:
    """Raise where two neighbouring noise levels are equal (forecasts divide by their distance), or are no flow's.

    Args:
        sigmas: of the steps that are walked.
        is_flow: whether they are the scheduler's own.

    Some combinations of diffusers' settings (`use_flow_sigmas` with `use_karras_sigmas` in DPMSolverMultistep) give the
    sigmas of a variance-exploding process, up to 157, and images of NaN.

    Raises:
        ValueError: with the first such step.

    """
    lowest, highest = float(sigmas.min()), float(sigmas.max())
    if highest > 1 + 1e-3 or lowest < 0 or not bool(torch.isfinite(sigmas).all()):
        given = "If you passed sigmas= to the pipeline, pass falling ones between 0 and 1, or none"
        settings = (
            "Otherwise set use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas and use_lu_lambdas to False in the "
            "scheduler, or use FlowMatchEulerDiscreteScheduler, which has them for flows"
        )
        # No setting makes levels below 0.
        cure = f"{given}." if lowest < 0 and highest <= 1 + 1e-3 else f"{given}. {settings}."
        raise ValueError(
            f"scheduler.sigmas must lie in [0, 1], as flow matching has them, got {lowest:.6g} to {highest:.6g}. {cure}"
        )
    repeated = (sigmas[1:] == sigmas[:-1]).nonzero()
    if len(repeated):
        step = int(repeated[0])
        name, cure = ("scheduler.sigmas", "") if is_flow else (_LEVELS, _OTHER_ENDS)
        raise ValueError(
            f"{name} repeats {float(sigmas[step]):.6g} at steps {step} and {step + 1}; caching needs distinct noise "
            f"levels. Use another schedule{cure}, or afcache.restore_pipeline(pipe)."
        )


def _agrees(timestep: Tensor, clock: Clock, expected: Tensor) -> bool:
    """Whether every sample's timestep is the scheduled one, up to the rounding of its dtype."""
    difference = (clock.read(timestep) - expected.to(timestep.device, torch.float32)).abs().max()
    return float(difference) <= clock.rounding(timestep) + 1e-2
