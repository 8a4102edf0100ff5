"""What steers a guidance branch, and whether it was switched since the last step.

A history of residuals belongs to one velocity field. Where a ControlNet is switched on or off, or a callback exchanges the
prompt or rescales an IP-Adapter, the next step sees another field, of which nothing is known. Nothing here waits for the
device.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from afcache.models.flux import FluxInputs


class Steering(NamedTuple):
    """What steers one step.

    Attributes:
        structure: shapes of all inputs; steps of another structure are other code.
        conditions: what pipelines hand over unchanged from step to step.
        is_controlled: whether a ControlNet says anything, 0-d; None without one.

    """

    structure: tuple[Any, ...]
    conditions: tuple[Tensor, ...]
    is_controlled: Tensor | None


def steering(inputs: FluxInputs) -> Steering:
    """Read the steering of a step off its inputs."""
    optional = (inputs.guidance, inputs.image_prompt_scales)
    given = (tensor for tensor in optional if tensor is not None)
    conditions = (inputs.encoder_hidden_states, inputs.pooled_projections, *inputs.image_prompts, *given)
    return Steering(_structure(inputs), conditions, _is_controlled(inputs))


def is_switched(before: Steering, now: Steering) -> Tensor | None:
    """Whether the second step is steered otherwise than the first; bool, 0-d, or None where it certainly is not."""
    if before.structure != now.structure:
        return torch.ones((), dtype=torch.bool, device=now.conditions[0].device)
    pairs = zip(before.conditions, now.conditions, strict=True)
    flags = [(then != present).any() for then, present in pairs if then is not present]
    if before.is_controlled is not None and now.is_controlled is not None:
        flags.append(before.is_controlled != now.is_controlled)
    return torch.stack(flags).any() if flags else None


def _structure(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_structure, value))
    return value.shape if isinstance(value, Tensor) else value


def _is_controlled(inputs: FluxInputs) -> Tensor | None:
    """Pipelines multiply a ControlNet's residuals by 0 outside of its range of steps.

    Of several ControlNets they hand over the sum, so that one which is switched while another stays is not seen.
    """
    first = [*inputs.controlnet_block_samples[:1], *inputs.controlnet_single_block_samples[:1]]
    return torch.stack([sample.any() for sample in first]).any() if first else None
