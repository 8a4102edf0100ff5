"""What steers a guidance branch, and whether it was switched since the last step.

A history belongs to one velocity field. Where a ControlNet is switched on or off, or a callback exchanges the
prompt or a control image or rescales an IP-Adapter, the next step sees another field, of which nothing is known. Nothing here
waits for the device.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from afcache._typing import Flag
from afcache.runtime.controls import Controls


class Steering(NamedTuple):
    """What steers one step.

    Attributes:
        structure: shapes of all inputs; steps of another structure are other code.
        conditions: what pipelines hand over unchanged from step to step.
        versions: of the conditions, counted up by edits in place; None under inference mode, which does not count.
        scales: of ControlNets, as the pipeline asked for them.
        is_controlled: whether a ControlNet says anything, 0-d; None without one.

    """

    structure: Any
    conditions: tuple[Tensor, ...]
    versions: tuple[int | None, ...]
    scales: tuple[float, ...]
    is_controlled: Flag | None


def steering_of(structure: Any, conditions: tuple[Tensor, ...], is_controlled: Tensor | None, controls: Controls) -> Steering:
    """The steering of a step.

    Args:
        structure: shapes of its inputs.
        conditions: of the call.
        is_controlled: whether a ControlNet says anything, 0-d; None without one.
        controls: what ControlNets were called with for it.

    """
    everything = (*conditions, *controls.images)
    versions = tuple(map(version_of, everything))
    shapes = (structure, tuple(image.shape for image in controls.images))
    return Steering(shapes, everything, versions, controls.scales, is_controlled)


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None under inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version


def is_unchanged(before: Steering, now: Steering) -> bool:
    """Whether two steps were given the very same tensors, whatever has become of what is in them."""
    pairs = zip(before.conditions, now.conditions, strict=False)
    return before.structure == now.structure and all(then is present for then, present in pairs)


def is_switched(before: Steering, now: Steering) -> Tensor | None:
    """Whether the second step is steered otherwise than the first; bool, 0-d, or None where it certainly is not."""
    device = now.conditions[0].device if now.conditions else None
    if before.structure != now.structure or before.scales != now.scales or _is_edited(before, now):
        return torch.ones((), dtype=torch.bool, device=device)
    pairs = zip(before.conditions, now.conditions, strict=True)
    flags = [(then != present).any().to(device) for then, present in pairs if then is not present]
    if before.is_controlled is not None and now.is_controlled is not None:
        flags.append(before.is_controlled != now.is_controlled)
    return torch.stack(flags).any() if flags else None


def _is_edited(before: Steering, now: Steering) -> bool:
    """Whether a condition is the same tensor with other values: what they were is gone, so that counts as a switch."""
    tensors = zip(before.conditions, now.conditions, strict=True)
    versions = zip(before.versions, now.versions, strict=True)
    return any(then is present and old != new for (then, present), (old, new) in zip(tensors, versions, strict=True))
