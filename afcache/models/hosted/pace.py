"""What is drawn beside the sample on a schedule of its own, shown as if it were on the sample's.

s, u: noise levels of the sample and of what is beside it, x: its latents, v: its velocity, dx/du. Two schedules that differ by
a shift alone are projective images of each other, and such maps keep lines straight:

    u = k s / p,  p(s) = 1 - (1 - k) s;    x = (1 - u) x_0 + u n    <=>    y = p x = (1 - s) x_0 + s (k n)

So y is a flow over s, straight where x is straight over u, with the same end. Euler's step of x over u is one of y over s:

    w = dy/ds = a v + b x,    a = p_next (u_next - u) / (s_next - s),    b = k - 1

which holds for any two schedules and any k. A forecast of w, its error, where a step leads and what catching up returns need
s alone, and are right for the sample and for what is beside it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from afcache._typing import Sigmas


class Pace(NamedTuple):
    """Of one step; float32, 0-d.

    Attributes:
        scale: p, of latents.
        of_velocity: a.
        of_latents: b.

    """

    scale: Tensor
    of_velocity: Tensor
    of_latents: Tensor


def pace_of(sigmas: Sigmas, beside: Sigmas, index: int) -> Pace:
    """The pace at a step of two schedules.

    Args:
        sigmas: s, noise levels of the sample, one more than steps.
        beside: u, as many, of what is drawn beside it.
        index: of the step.

    """
    s, u = sigmas.to(torch.float32), beside.to(sigmas.device, torch.float32)
    # Of the last step, whose levels are the farthest from 1, where both schedules begin; of a single step it does not matter.
    shift = u[-2] * (1 - s[-2]) / (s[-2] * (1 - u[-2]))
    k = torch.where(torch.isfinite(shift) & (shift > 0), shift, torch.ones_like(shift))
    scale, scale_next = 1 - (1 - k) * s[index], 1 - (1 - k) * s[index + 1]
    of_velocity = scale_next * (u[index + 1] - u[index]) / (s[index + 1] - s[index])
    return Pace(scale, of_velocity, k - 1)


def enter(pace: Pace, velocity: Tensor, latents: Tensor) -> Tensor:
    """W of v at x, of one shape."""
    return pace.of_velocity * velocity + pace.of_latents * latents


def leave(pace: Pace, velocity: Tensor, latents: Tensor) -> Tensor:
    """V of w at x, of one shape: what `enter` was given."""
    return (velocity - pace.of_latents * latents) / pace.of_velocity
