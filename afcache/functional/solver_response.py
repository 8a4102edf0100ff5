"""Catching up under any linear solver: what a forecast's error does to the latents, and how later outputs undo it.

Deterministic schedulers are linear in the sample and in the model's outputs m_j. After step i the latents are

    x_{i+1} = A_i x_0 + sum_{j <= i} R_i[j] m_j

with numbers R_i[j] that depend on the schedule alone (`afcache.runtime.solver` finds them). Between two refreshes the forecasts
of the steps j are off by e_j = d g_j / g_i, d = v_i - v_hat_i as the refresh at i finds it, g the growth law of error control.
The latents are where they would be without these errors if step i returns c_i d on top of its output, where

    c_i = (sum_{j < i} R_i[j] g_j / g_i - sum_{l < i} R_i[l] c_l) / R_i[i]

and a solver that remembers the wrong outputs for some steps is told so at each of them, by the same formula; after the next
refresh as far as its d points where this one did. Under Euler's step R_i[j] = sigma_{j+1} - sigma_j whatever i is, so that c_i
is the factor of `afcache.functional.error_control.catch_up`, and all later ones are 0.

Where errors grow exactly as their law says (a velocity linear in sigma, reused; as any of degree n + 1, extrapolated in order n
under the remainder's law), the latents after a refresh are exact under every linear solver.
"""

import torch
from torch import Tensor

from afcache._typing import Flags, PerSample, Response, Velocity, typed
from afcache.functional.shapes import per_sample
from afcache.functional.state import SolverState

# Weights that a step is given: its own output's, and those of the outputs before it. What is older counts as the oldest does.
WINDOW = 64


@typed
def respond(
    solver: SolverState, velocity: Velocity, forecast: Velocity, response: Response, *, growth: PerSample, refresh: Flags
) -> tuple[Velocity, SolverState]:
    """What a step returns to a solver, and what is known of the outputs after it.

    Args:
        solver: what is known of earlier outputs.
        velocity: v where the step is computed, v_hat elsewhere.
        forecast: v_hat.
        response: R_i of the step, the newest output's first.
        growth: g at the step, by the law of its forecast.
        refresh: the decision.

    Returns:
        the velocity with c d added, in its own dtype; the next state, fresh.
    Cost:
        one pass over the velocity, and as much memory in float32.

    """
    difference = velocity.to(torch.float32) - forecast.to(torch.float32)
    direction = torch.where(per_sample(refresh, difference), difference, solver.direction)
    # An error that grew with g is known in units of d as soon as d is; what is known in units of the last d, as far as the new
    # one has the same direction.
    found = torch.where(solver.pending == 0, torch.zeros_like(solver.pending), -solver.pending / growth)
    off = torch.where(refresh, found + _share(solver.direction, direction) * solver.settled, solver.settled)
    off = _finite(off)
    response = response.reshape(len(response), -1)
    factor = _finite(-(response[1:] * off).sum(0) / response[0])
    grown = torch.where(refresh, torch.zeros_like(growth), growth)
    pending = torch.where(refresh, torch.zeros_like(solver.pending), solver.pending)
    state = SolverState(_shift(grown, pending, response), _shift(factor, off, response), direction)
    return _add(velocity, factor, direction), state


def _share(of: Tensor, direction: Tensor) -> Tensor:
    """<a, d> / <d, d>: how much of d is in a, `[batch]`; 0 where d is 0."""
    products = (of * direction).flatten(1).sum(1), (direction * direction).flatten(1).sum(1)
    return torch.where(products[1] > 0, products[0] / products[1], torch.zeros_like(products[0]))


def _add(velocity: Tensor, factor: Tensor, direction: Tensor) -> Tensor:
    """The velocity with c d added; as it is where c is 0, or the sum is not finite."""
    wide = per_sample(factor, velocity)
    corrected = (velocity.to(torch.float32) + wide * direction).to(velocity.dtype)
    return torch.where((wide != 0) & torch.isfinite(corrected), corrected, velocity)


def _shift(newest: Tensor, before: Tensor, response: Tensor) -> Tensor:
    """The newest before the others, of which the oldest joins the one after it: long ago, both weigh alike but for a factor."""
    *_, last, oldest = response.unbind()
    factor = torch.where(last == 0, torch.zeros_like(last), oldest / last)
    return torch.cat([newest[None], before[:-2], before[-2:-1] + factor * before[-1:]])


def _finite(values: Tensor) -> Tensor:
    return torch.where(torch.isfinite(values), values, torch.zeros_like(values))
