"""What the history keeps of a computed step, and how the forecast of it becomes a velocity again.

x: the latents at noise level sigma, v: the velocity computed there.

| target | kept | v_hat |
|---|---|---|
| "residual" | what the blocks add to their tokens | the head on what the blocks would have made |
| "velocity" | z = v | z_hat |
| "noise" | z = x + (tau - sigma) v | (z_hat - x) / (tau - sigma), tau = 1.1 |

"noise" is where the straight line through (x, v) arrives at noise level tau: the predicted noise for tau = 1, the clean image
for tau = 0. It does not change along a straight path, and uses the present x, which a cached step knows exactly. A tau a little
above 1 keeps the division away from zero at sigma = 1. Of models that are no flow's, "velocity" is their output, whatever that
predicts, and the noise is `afcache.functional.process`'s.

Reference:
    Liu, Gong, Liu, 2022, arXiv 2209.03003: paths of rectified flow are straight where the velocity is constant.
"""

import torch
from torch import Tensor

from afcache._typing import Latents, Level, Tokens, Velocity, typed
from afcache.functional.process import Process
from afcache.functional.shapes import per_sample
from afcache.settings.config import Target

# tau: of 1.02 to 2.5, the best at few and at many steps on trained models.
NOISE_LEVEL = 1.1


@typed
def keep_residual(tokens: Tokens, start: Tokens) -> Tokens:
    """What the blocks added to the tokens that they started from."""
    return tokens - start


@typed
def release_residual(residual_hat: Tokens, start: Tokens) -> Tokens:
    """The tokens that the blocks would have made of those that they start from."""
    return start + residual_hat


@typed
def keep_output(
    velocity: Velocity, latents: Latents, sigma: Level, *, target: Target, process: Process | None = None
) -> Velocity:
    """z: what the history keeps of a velocity.

    Args:
        velocity: v at `latents`.
        latents: x, of the same shape.
        sigma: noise level of the step.
        target: "velocity" or "noise"; static.
        process: how both are joined; None in a flow.

    Returns:
        float32, fresh: bfloat16 latents and velocities are exact in it, z is not in theirs.

    """
    if target == "velocity":
        return velocity.to(torch.float32, copy=True)
    x, v = latents.to(torch.float32), velocity.to(torch.float32)
    if process is not None:
        return per_sample(process.noise_of_latents, x) * x + per_sample(process.noise_of_output, v) * v
    return x + per_sample(NOISE_LEVEL - sigma, v) * v


@typed
def release_output(
    forecast: Velocity, latents: Latents, sigma: Level, *, target: Target, process: Process | None = None
) -> Velocity:
    """v_hat: the velocity at `latents` that a forecast of z means.

    Args:
        forecast: z_hat, float32.
        latents: x at the step.
        sigma: its noise level.
        target: "velocity" or "noise"; static.
        process: how both are joined; None in a flow.

    Returns:
        in the dtype of `latents`.

    """
    velocity: Tensor = forecast
    if target != "velocity" and process is not None:
        of_latents, of_output = (per_sample(number, forecast) for number in (process.noise_of_latents, process.noise_of_output))
        velocity = (forecast - of_latents * latents.to(torch.float32)) / of_output
    elif target != "velocity":
        velocity = (forecast - latents.to(torch.float32)) / per_sample(NOISE_LEVEL - sigma, forecast)
    return velocity.to(latents.dtype)
