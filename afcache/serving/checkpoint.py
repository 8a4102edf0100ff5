"""A request on its way as bytes: another batcher of the same model goes on with it where it was."""

import json
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from afcache._version import __version__
from afcache.functional.samples import move_samples
from afcache.functional.state import CacheState
from afcache.sampling.checks import check_start
from afcache.sampling.loop import Journey, branch_shape
from afcache.sampling.origin import Origin
from afcache.sampling.parts import build, flatten, items, read_origin, unflatten, write_origin
from afcache.sampling.result import Denoised
from afcache.serving.running import Standing
from afcache.settings.config import Target

_FORMAT = "afcache request 1"


class Kept(NamedTuple):
    """A request's checkpoint.

    Attributes:
        standing: where it was; on the CPU.
        target: what its histories keep.
        origin: what it is of.

    """

    standing: Standing
    target: Target
    origin: Origin


def write_request(standing: Standing, *, target: Target, origin: Origin) -> bytes:
    """A request between two of its steps.

    Args:
        standing: where it is.
        target: what its histories keep.
        origin: what it is of.
    Cost:
        as many bytes as the states; waits for the device.

    """
    parts = {"latents": standing.latents, "states": standing.states}
    tensors = {name: tensor.detach().cpu().clone() for key, part in parts.items() for name, tensor in flatten(key, part)}
    metadata = {
        "format": _FORMAT,
        "afcache": __version__,
        "target": target,
        "pattern": standing.pattern,
        "due": str(standing.due),
        "origin": write_origin(origin),
    }
    return save(tensors, metadata)


def read_request(data: bytes) -> Kept:
    """What `write_request` wrote.

    Raises:
        TypeError: it is no bytes.
        ValueError: it is no such checkpoint, or a damaged one.

    """
    if not isinstance(data, bytes):
        raise TypeError(f"start must be the bytes of Handle.checkpoint(), got {type(data).__name__}.")
    try:
        tensors: dict[str, Any] = load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
        tree = unflatten(tensors)
        states = tuple(build(CacheState, state) for state in items(tree["states"]))
        origin = read_origin(metadata["origin"])
        assert origin is not None
        standing = Standing(tree["latents"], states, metadata["pattern"], int(metadata["due"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"start must be the bytes of Handle.checkpoint(), of this version and whole: {error}.") from error
    return Kept(standing, metadata["target"], origin)


def resume(kept: Kept, journey: Journey) -> Standing:
    """Where a request goes on.

    Args:
        kept: its checkpoint.
        journey: the request from its beginning, with its origin.

    Returns:
        on the journey's device.

    Raises:
        ValueError: the checkpoint is of another model, prompt, schedule, guidance or other settings, or of another shape.

    """
    own = journey.start
    assert own.origin is not None
    device, count = own.latents.device, len(journey.schedule)
    standing = kept.standing
    if not len(standing.pattern) < count or not len(standing.pattern) <= standing.due <= count:
        raise ValueError(
            f"start must have some of its {count} steps before it, and be due at one of them or at none, got "
            f"{len(standing.pattern)} done and due at {standing.due}. Take Handle.checkpoint() of the same request."
        )
    states = tuple(move_samples(state, device) for state in standing.states)
    start = Denoised(standing.latents.to(device), states, [()] * len(standing.pattern), kept.target, kept.origin)
    shapes = [branch_shape(journey.model, branch, journey.config) for branch in journey.branches]
    check_start(start, own, torch.tensor(own.origin.sigmas), shapes, journey.config)
    return standing._replace(latents=start.latents, states=states)
