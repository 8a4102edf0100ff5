"""What the flow trainings of all small models share: the step of their optimisers, and the timesteps they may see."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Sinusoids of the timestep embedding faster than this (radians per unit of 1000 sigma) never decay in a short training
# and make the features jitter from step to step; held-out loss is the same without them.
_TIMESTEP_CUT = 0.02


def descend(loss: Tensor, module: Any, optimizers: Sequence[torch.optim.Optimizer], lr: float) -> None:
    """One step of all optimisers at a learning rate, with gradients of norm 1 at most."""
    for optimizer in optimizers:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = lr
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


def slow_timesteps(num_channels: int) -> Tensor:
    """1 for the sinusoids of a timestep embedding that are kept, else 0; float32 `[num_channels]`, cosines before sines."""
    half = num_channels // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half) / half)
    return (frequency <= _TIMESTEP_CUT).float().repeat(2)
