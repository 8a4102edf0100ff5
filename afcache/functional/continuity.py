"""Whether a step begins where the last one led: a forecast holds on the trajectory alone on which it was made.

x: the latents that a step is given, e_b: where branch b's own velocity had led, in Euler's way (`Trail`).

    m = x - e_1,  d = e_1 - e_2,  ||m - d <m, d> / <d, d>|| <= 2 max_b ||(sigma_next - sigma) v_b||

Guidance moves x along d, whatever its scale; with more branches within the plane of all d, by orthogonal projection. What else
parts x from e_1 stays within two lengths of the step: solvers of higher order, guidance that rescales its velocity, and the
blending of inpainting. A forecast bears a jump of that size, and other latents of the same noise level are farther away
(`python -m bench.jumps`).
"""

import torch
from torch import Tensor

from afcache._typing import Flags, Latents, Level, PerSample, typed
from afcache.functional.process import moved
from afcache.functional.shapes import per_sample
from afcache.functional.state import CacheState, Coupling, StepSchedule, Trail
from afcache.functional.update import Branch, Taken, restart

# Lengths of the last step.
_REACH = 2.0
# Units in the last place by which a scheduler may round, relative to the latents' norm.
_ROUNDING = 4.0
# Noise levels that differ by less are the same step's.
_SAME_SIGMA = 1e-5


@typed
def strays(latents: Latents, states: tuple[CacheState, ...], schedule: StepSchedule, coupling: Coupling) -> Flags | None:
    """Which samples are not where their last step led, by the first branch; the others do what it did.

    Args:
        latents: x.
        states: of the branches that are called together.
        schedule: where the step stands.
        coupling: of the first branch.

    Returns:
        None where nobody looks.
    Cost:
        one pass over the latents and the trails, no host synchronisation.

    """
    own = [state.trail for state in states if state.trail is not None]
    if coupling.trails is None or not own:
        return None
    is_astray = is_elsewhere(latents, (*own, *coupling.trails), schedule.sigma)
    if coupling.leader_restarted is None:
        return is_astray
    return torch.where(coupling.is_follower, coupling.leader_restarted, is_astray)


@typed
def is_elsewhere(latents: Latents, trails: tuple[Trail, ...], sigma: Level) -> Flags:
    """Which samples are not where a step led: bool `[batch]`; true where anything is not finite. Arguments as of `miss`."""
    return ~(miss(latents, trails, sigma) <= 1)


@typed
def miss(latents: Latents, trails: tuple[Trail, ...], sigma: Level) -> PerSample:
    """How far samples are from where a step led: the square of the distance, relative to that of what is allowed.

    Args:
        latents: x.
        trails: of the guidance branches, the leader's first; another one that leads to another noise level was not called at
            the last step.
        sigma: noise level of x; 0-d, or `[batch]`.

    Returns:
        float32; 0 before the first step, infinite at another noise level, NaN where anything is not finite.

    """
    x, (first, *others) = latents.to(torch.float32), trails
    missed, length = x - first.latents, first.length
    square = _inner(missed, missed)
    directions: list[tuple[Tensor, PerSample]] = []
    for other in others:
        is_called = (other.sigma - sigma).abs() <= _SAME_SIGMA
        direction = first.latents - other.latents
        for before, size in directions:
            direction = direction - per_sample(_ratio(_inner(direction, before), size), before) * before
        along, size = _inner(missed, direction), _inner(direction, direction)
        square = torch.where(is_called, square - _ratio(along.square(), size), square)
        length = torch.where(is_called, torch.maximum(length, other.length), length)
        directions.append((direction, torch.where(is_called, size, torch.zeros_like(size))))
    rounding = _ROUNDING * torch.finfo(latents.dtype).eps
    limit = _REACH * length + rounding * _inner(x, x).sqrt()
    ratio = square / limit.square().clamp(min=torch.finfo(torch.float32).tiny)
    is_at_level = (first.sigma - sigma).abs() <= _SAME_SIGMA
    ratio = torch.where(is_at_level, ratio, torch.full_like(ratio, float("inf")))
    return torch.where(torch.isfinite(first.sigma), ratio, torch.zeros_like(ratio))


@typed
def stay(branch: Branch, is_astray: Flags | None) -> Branch:
    """The branch before its step, whose samples that are elsewhere, bool `[batch]`, begin anew; None leaves it as it is."""
    return branch if is_astray is None else branch._replace(state=restart(branch.state, is_astray))


@typed
def leave_trail(taken: Taken, latents: Latents, restarted: Flags | None, schedule: StepSchedule) -> Taken:
    """The branch after its step, which remembers where that leads.

    Args:
        taken: the branch.
        latents: x, at which it was taken.
        restarted: what `strays` found.
        schedule: where the step stands.

    """
    if taken.state.trail is None:
        return taken
    record = taken.record if restarted is None else taken.record._replace(restarted=restarted.clone())
    return taken._replace(state=taken.state._replace(trail=trail_of(latents, taken.velocity, schedule)), record=record)


@typed
def trail_of(latents: Latents, velocity: Latents, schedule: StepSchedule) -> Trail:
    """Where a velocity leads: from latents x `[batch, *latent]`, to first order, to the schedule's next noise level."""
    step = moved(latents, velocity, schedule.sigma_next - schedule.sigma, process=schedule.process)
    length = _inner(step, step).sqrt()
    return Trail(latents.to(torch.float32) + step, length, torch.zeros_like(length) + schedule.sigma_next)


def _ratio(part: PerSample, whole: PerSample) -> PerSample:
    """0 where there is no whole."""
    return torch.where(whole > 0, part / whole, torch.zeros_like(part))


def _inner(x: Tensor, y: Tensor) -> PerSample:
    """Inner product of each sample."""
    return (x * y).sum(tuple(range(1, x.ndim)))
