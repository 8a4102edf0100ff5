"""Classifier-free guidance: one decision for all branches, and the velocity that they make together.

    v = v_2 + s (v_1 - v_2): the prompt's branch is the first, s the guidance scale

Reference:
    Ho, Salimans, 2022, arXiv 2207.12598.
"""

import torch
from torch import Tensor

from afcache._typing import PerSample, Velocity, typed
from afcache.functional.damping import learn_damping
from afcache.functional.decision import predict_error
from afcache.functional.distance import relative_l2
from afcache.functional.initial import uncoupled
from afcache.functional.model import Model
from afcache.functional.process import direction
from afcache.functional.shapes import per_sample
from afcache.functional.state import CacheState, Coupling, GroupRecord, Lead, StepRecord, StepSchedule
from afcache.functional.update import Computed, Prepared
from afcache.settings.config import CacheConfig

# How far the step that was taken may be from what a guidance scale makes of both branches: as it is, or rescaled.
_EXACT, _RESCALED = 0.02, 0.25


@typed
def lead(states: tuple[CacheState, ...], schedule: StepSchedule, guidance_scale: PerSample, *, config: CacheConfig) -> Coupling:
    """The coupling of the first branch, which decides for all by the error that is expected of the guided velocity."""
    first, *others = states
    coupling = uncoupled(len(guidance_scale), groups=config.num_groups, device=first.nodes.device)
    if not others:
        return coupling
    weight, others_weight = weigh(guidance_scale, config=config)
    error = others_weight * sum(predict_error(state, schedule, config=config) for state in others)
    measured = guidance_scale if config.forecasts_output else None
    return coupling._replace(weight=weight, others_error=error, guidance_scale=measured)


@typed
def weigh(guidance_scale: PerSample, *, config: CacheConfig) -> tuple[PerSample, PerSample]:
    """How much the predicted error of the first and of any other branch counts.

    Where outputs are forecast, the last branch has measured the guided velocity's own error, and it alone counts. Else, or
    where s is unknown, the error is bounded by |s| e_1 + |1 - s| e_2, or e_1 + e_2.

    Args:
        guidance_scale: s per sample, NaN where unknown.
        config: settings; static.

    """
    ones = torch.ones_like(guidance_scale)
    is_known = torch.isfinite(guidance_scale)
    if config.forecasts_output:
        return torch.where(is_known, torch.zeros_like(ones), ones), ones
    return torch.where(is_known, guidance_scale.abs(), ones), torch.where(is_known, (1 - guidance_scale).abs(), ones)


@typed
def measure_errors(
    model: Model,
    prepared: tuple[Prepared, ...],
    computed: tuple[Computed, ...],
    schedule: StepSchedule,
    coupling: Coupling,
    *,
    config: CacheConfig,
) -> tuple[Computed, ...]:
    """What the forecasts of a refresh were off by: each branch's own, and the guided velocity's in the last branch's place.

    Ranks that each measure the whole adopt what the first one has measured.

    Args:
        model: the transformer.
        prepared: the branches of a call, with their forecasts.
        computed: the same branches, computed.
        schedule: where the step stands.
        coupling: with a guidance scale where the guided error is asked for, and with what a branch that was called before this
            one has found.
        config: settings; static. Where damping is learnt, it is here.

    """
    # Of a flow the velocity is the direction, and reading the latents may be a copy.
    latents = None if schedule.process is None else model.architecture.latents(prepared[0].inputs)

    def error(estimate: Velocity, exact: Velocity) -> PerSample:
        if schedule.process is not None and latents is not None:
            estimate, exact = (direction(output, latents, process=schedule.process) for output in (estimate, exact))
        return relative_l2(estimate, exact, reduction=model.exchange.over_tokens)

    errors = [error(its.velocity, each.velocity) for its, each in zip(prepared, computed, strict=True)]
    scale, found = coupling.guidance_scale, coupling.lead
    if scale is not None and (len(computed) == 2 or found is not None):
        first = Lead(computed[0].velocity, prepared[0].velocity) if found is None else found
        estimate, exact = (first.forecast, prepared[-1].velocity), (first.velocity, computed[-1].velocity)
        guided = error(guide(estimate, scale), guide(exact, scale))
        is_guided = torch.isfinite(scale) if found is None else torch.isfinite(scale) & coupling.is_follower
        errors[-1] = torch.where(is_guided, guided, errors[-1])
    pairs = zip(prepared, computed, strict=True) if config.learns_damping else ()
    over_tokens = model.exchange.over_tokens
    learnt = [learn_damping(its, each, schedule, config=config, reduction=over_tokens) for its, each in pairs]
    # One message for all branches.
    adopted = model.exchange.adopt_error(torch.stack([*errors, *learnt]))
    # Sums of one row each: inductor takes a copy of a view back, and what leaves a branch must be no view.
    rows = [adopted[index : index + 1].sum(0) for index in range(len(adopted))]
    dampings = rows[len(computed) :] or [None] * len(computed)
    found = zip(computed, rows[: len(computed)], dampings, strict=True)
    return tuple(its._replace(error=error, damping=damping) for its, error, damping in found)


@typed
def follow(coupling: Coupling, record: StepRecord, lead: Lead | None = None) -> Coupling:
    """The coupling of the branches after the first: they do what it did, and measure by what it found."""
    return coupling._replace(
        is_follower=torch.ones_like(coupling.is_follower),
        leader_refresh=record.refresh,
        weight=torch.ones_like(coupling.weight),
        others_error=torch.zeros_like(coupling.others_error),
        leader_choice=record.groups.choice if isinstance(record.groups, GroupRecord) else None,
        lead=lead,
        leader_restarted=coupling.leader_restarted if record.restarted is None else record.restarted,
    )


@typed
def guide(velocities: tuple[Velocity, ...], guidance_scale: PerSample) -> Velocity:
    """The guided velocity, float32; the first one alone where there is one branch."""
    velocity, *others = (velocity.to(torch.float32) for velocity in velocities)
    for other in others:
        velocity = other + per_sample(guidance_scale, other) * (velocity - other)
    return velocity


@typed
def infer_guidance(step: Velocity, first: Velocity, second: Velocity, *, rounding: PerSample) -> PerSample:
    """The guidance scale s that turned two branch velocities into the step that was taken.

    step = second + s (first - second), solved by least squares: s = <step - second, first - second> / ||first - second||^2.
    Where the guided velocity is rescaled, to the prompt's norm or by a cap: step = r (second + s (first - second)), r > 0, of
    which r does not matter to a relative error. Norms of single tokens make that an approximation.

    Args:
        step: (x_{i+1} - x_i) / (sigma_{i+1} - sigma_i), the velocity that the scheduler integrated.
        first: velocity of the branch called first (the prompt's, in diffusers' pipelines).
        second: velocity of the branch called second.
        rounding: norm that the rounding of the latents may add to `step`.

    Returns:
        float32; NaN where no scale explains the step: the fit is off by more than 2 % and rounding, and by more than 25 % if
        it is rescaled (the scheduler added noise, or a callback changed the latents), or the branches do not differ.

    """
    step, second = step.to(torch.float32), second.to(torch.float32)
    direction = first.to(torch.float32) - second
    scale = _inner(step - second, direction) / _inner(direction, direction)
    size, unknown = _inner(step, step), torch.full_like(scale, float("nan"))
    is_explained = _misfit(step, second, direction, torch.ones_like(scale), scale) <= _EXACT**2 * size + rounding.square()
    factor, moved = _fit(step, second, direction)
    is_rescaled = (factor > 0) & (_misfit(step, second, direction, factor, moved) <= _RESCALED**2 * size)
    return torch.where(is_explained, scale, torch.where(is_rescaled, moved / factor, unknown))


def _fit(step: Tensor, second: Tensor, direction: Tensor) -> tuple[PerSample, PerSample]:
    """The numbers r and q of the least ||step - r second - q direction||."""
    along_second, along_direction = _inner(step, second), _inner(step, direction)
    of_second, of_direction, of_both = _inner(second, second), _inner(direction, direction), _inner(second, direction)
    determinant = of_second * of_direction - of_both.square()
    factor = (along_second * of_direction - along_direction * of_both) / determinant
    return factor, (along_direction * of_second - along_second * of_both) / determinant


def _misfit(step: Tensor, second: Tensor, direction: Tensor, factor: PerSample, moved: PerSample) -> PerSample:
    """||step - factor second - moved direction||^2."""
    left = step - per_sample(factor, step) * second - per_sample(moved, step) * direction
    return _inner(left, left)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of each sample."""
    return (x * y).sum(tuple(range(1, x.ndim)))
