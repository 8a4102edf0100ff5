"""A request on its way as bytes: another batcher of the same model goes on with it where it was."""

import hashlib
import json
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

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
        noise: digest of the latents that it began with.

    """

    standing: Standing
    target: Target
    origin: Origin
    noise: str


def digest_of_latents(branches: tuple[Any, ...]) -> str:
    """Of what a request begins with: noise, or a picture with noise."""
    return _digest([branches[0].hidden_states])


def write_request(standing: Standing, *, target: Target, origin: Origin, noise: str) -> bytes:
    """A request between two of its steps.

    Args:
        standing: where it is.
        target: what its histories keep.
        origin: what it is of.
        noise: digest of the latents that it began with.
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
        "noise": noise,
        "digest": _digest([tensors[name] for name in sorted(tensors)]),
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
        if metadata["digest"] != _digest([tensors[name] for name in sorted(tensors)]):
            raise ValueError("its tensors are not those that were written")
        tree = unflatten(tensors)
        states = tuple(build(CacheState, state) for state in items(tree["states"]))
        origin = read_origin(metadata["origin"])
        assert origin is not None
        standing = Standing(tree["latents"], states, metadata["pattern"], int(metadata["due"]))
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise ValueError(f"start must be the bytes of Handle.checkpoint(), of this version and whole: {error}.") from error
    return Kept(standing, metadata["target"], origin, metadata["noise"])


def resume(kept: Kept, journey: Journey) -> Standing:
    """Where a request goes on.

    Args:
        kept: its checkpoint.
        journey: the request from its beginning, with its origin.

    Returns:
        on the journey's device.

    Raises:
        ValueError: the checkpoint is of another model, prompt, noise, schedule, guidance or other settings, or of another
            shape.

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
    if kept.noise != digest_of_latents(journey.branches):
        raise ValueError("start must have begun with the latents of this request: pass the generator, and image, of before.")
    # What was foreseen holds for the tolerance of before.
    due = standing.due if kept.origin.settings == own.origin.settings else len(standing.pattern)
    return standing._replace(latents=start.latents, states=states, due=due)


def _digest(tensors: list[Tensor]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
