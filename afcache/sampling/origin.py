"""What a trajectory is of: model, inputs, schedule, guidance and settings, in a form that is cheap to keep and to compare."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from afcache._typing import HostModule
from afcache.functional.model import Model
from afcache.runtime.subclasses import is_subclass
from afcache.runtime.weights import Weights
from afcache.settings.config import CacheConfig

# Of each weight about so many values are looked at.
_VALUES = 8


class Origin(NamedTuple):
    """What a trajectory is of.

    Attributes:
        model: the transformer's class, a digest of its config, and one of its weights: names, shapes, dtypes, a few values of
            each, and what adapters do.
        inputs: for each guidance branch a digest of all that stays the same from step to step, so not of the latents.
        sigmas: the whole schedule's noise levels, float32.
        guidance_scale: of all samples.
        settings: of the config, as JSON.

    """

    model: str
    inputs: tuple[str, ...]
    sigmas: tuple[float, ...]
    guidance_scale: float
    settings: str


def origin_of(model: Model, branches: tuple[Any, ...], sigmas: Tensor, *, guidance_scale: float, config: CacheConfig) -> Origin:
    """What a trajectory with these arguments is of.

    Args:
        model: the transformer and its parts.
        branches: inputs of each guidance branch.
        sigmas: noise levels, one more than steps.
        guidance_scale: of all samples.
        config: settings.
    Cost:
        waits for the device; reads the inputs, and of every weight a few values: milliseconds.

    """
    return Origin(
        model=_describe_model(model.transformer),
        inputs=tuple(_digest_inputs(model, branch) for branch in branches),
        sigmas=tuple(sigmas.float().tolist()),
        guidance_scale=float(guidance_scale),
        settings=_write_settings(config),
    )


def _write_settings(config: CacheConfig) -> str:
    compared = {field.name for field in dataclasses.fields(config) if field.compare}
    return json.dumps({name: value for name, value in config.to_dict().items() if name in compared}, sort_keys=True)


def _describe_model(transformer: HostModule) -> str:
    """Class and digests, for comparison and for messages."""
    kind = type(transformer).__name__
    if not isinstance(transformer, nn.Module):
        return kind
    settings = {name: value for name, value in dict(getattr(transformer, "config", {})).items() if not name.startswith("_")}
    config = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    weights = hashlib.sha256(repr(Weights(transformer).adapted()).encode())
    tensors = {name: part for key, weight in transformer.named_parameters() for name, part in _plain_tensors(key, weight)}
    for (name, tensor), values in zip(tensors.items(), _sample(list(tensors.values())), strict=True):
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        _add_tensor(weights, values)
    return f"{kind}, config {config.hexdigest()[:12]}, weights {weights.hexdigest()[:12]}"


def _plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A weight, or those that a quantised one is made of."""
    if not is_subclass(tensor):
        yield name, tensor.detach()
        return
    for part in tensor.__tensor_flatten__()[0]:  # pyright: ignore[reportAttributeAccessIssue]
        yield from _plain_tensors(f"{name}.{part}", getattr(tensor, part))


def _sample(tensors: list[Tensor]) -> list[Tensor]:
    """A few values of each tensor, on the CPU; one copy from each device for each dtype. Of tensors without memory none."""
    sampled = [torch.empty(0)] * len(tensors)
    places: dict[Any, dict[int, Tensor]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.device.type != "meta":
            values = tensor.flatten()[:: max(1, tensor.numel() // _VALUES)]
            places.setdefault((tensor.device, tensor.dtype), {})[index] = values
    for chosen in places.values():
        together = torch.cat(list(chosen.values())).cpu().split([len(values) for values in chosen.values()])
        for index, values in zip(chosen, together, strict=True):
            sampled[index] = values
    return sampled


def _digest_inputs(model: Model, inputs: Any) -> str:
    """Of everything but the latents and the timestep, which are placed anew at every step."""
    latents = model.architecture.latents(inputs)
    nowhere = torch.zeros((), dtype=torch.float32, device=latents.device)
    digest = hashlib.sha256()
    _add(digest, model.architecture.place(inputs, torch.zeros_like(latents), nowhere))
    return digest.hexdigest()[:12]


def _add(digest: Any, value: Any) -> None:
    """Add a value, or what it holds, field by field."""
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
        _add_tensor(digest, value.detach().cpu())
    elif isinstance(value, tuple | list):
        digest.update(f"{len(value)}".encode())
        for part in value:
            _add(digest, part)
    else:
        digest.update(repr(value).encode())


def _add_tensor(digest: Any, values: Tensor) -> None:
    digest.update(values.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy())
