"""Classifier-free guidance: one decision for all branches, and the velocity that they make together.

    v = v_2 + s (v_1 - v_2): the prompt's branch is the first, s the guidance scale

Reference:
    Ho, Salimans, 2022, arXiv 2207.12598.
"""

import torch
from einops import rearrange

from afcache._typing import PerSample, Velocity, typed
from afcache.functional.decision import predict_error
from afcache.functional.initial import uncoupled
from afcache.functional.state import CacheState, Coupling, GroupRecord, StepRecord, StepSchedule
from afcache.settings.config import CacheConfig


@typed
def lead(states: tuple[CacheState, ...], schedule: StepSchedule, guidance_scale: PerSample, *, config: CacheConfig) -> Coupling:
    """The coupling of the first branch, which decides for all: errors of the guided velocity weigh |s| and |1 - s|."""
    first, *others = states
    coupling = uncoupled(len(guidance_scale), groups=config.num_groups, device=first.nodes.device)
    if not others:
        return coupling
    weight = (1 - guidance_scale).abs()
    error = weight * sum(predict_error(state, schedule, config=config) for state in others)
    return coupling._replace(weight=guidance_scale.abs(), others_error=error)


@typed
def follow(coupling: Coupling, record: StepRecord) -> Coupling:
    """The coupling of the branches after the first: they do what it did."""
    return coupling._replace(
        is_follower=torch.ones_like(coupling.is_follower),
        leader_refresh=record.refresh,
        weight=torch.ones_like(coupling.weight),
        others_error=torch.zeros_like(coupling.others_error),
        leader_choice=record.groups.choice if isinstance(record.groups, GroupRecord) else None,
    )


@typed
def guide(velocities: tuple[Velocity, ...], guidance_scale: PerSample) -> Velocity:
    """The guided velocity, float32; the first one alone where there is one branch."""
    velocity, *others = (velocity.to(torch.float32) for velocity in velocities)
    for other in others:
        velocity = other + rearrange(guidance_scale, "batch -> batch 1 1") * (velocity - other)
    return velocity


@typed
def infer_guidance(step: Velocity, first: Velocity, second: Velocity, *, rounding: PerSample) -> PerSample:
    """The guidance scale s that turned two branch velocities into the step that was taken.

    step = second + s (first - second), solved by least squares: s = <step - second, first - second> / ||first - second||^2.

    Args:
        step: (x_{i+1} - x_i) / (sigma_{i+1} - sigma_i), the velocity that the scheduler integrated.
        first: velocity of the branch called first (the prompt's, in diffusers' pipelines).
        second: velocity of the branch called second.
        rounding: norm that the rounding of the latents may add to `step`.

    Returns:
        float32; NaN where no scale explains the step: the fit is off by more than 2 % and rounding (the scheduler added noise,
        or a callback changed the latents), or the branches do not differ.

    """
    step, second = step.to(torch.float32), second.to(torch.float32)
    direction = first.to(torch.float32) - second
    scale = ((step - second) * direction).sum((1, 2)) / direction.square().sum((1, 2))
    misfit = (second + scale[:, None, None] * direction - step).square().sum((1, 2))
    allowed = (0.02**2) * step.square().sum((1, 2)) + rounding.square()
    return torch.where(misfit <= allowed, scale, torch.full_like(scale, float("nan")))
