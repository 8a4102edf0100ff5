"""A trajectory on disk: latents, states and records, in one safetensors file."""

from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from afcache._checks import check_choice, show
from afcache._version import __version__
from afcache.functional.state import CacheState, StepRecord
from afcache.sampling.origin import Origin
from afcache.sampling.parts import build, flatten, items, read_origin, unflatten, write_origin
from afcache.sampling.result import Denoised
from afcache.settings.config import Target

_FORMAT = "afcache checkpoint 3"
# Of a trajectory, those that are tensors.
_PARTS = ("latents", "states", "records")


def save_checkpoint(trajectory: Denoised, path: str | Path) -> None:
    """Write a trajectory, finished or not, so that `denoise(start=load_checkpoint(path))` goes on bit by bit as it would have.

    Args:
        trajectory: what `denoise` returned, or `Denoised(latents, states, records, target)` of steps of your own.
        path: of the safetensors file, in a folder that exists.
    Cost:
        as many bytes as the states, which is the history for the most part.

    Raises:
        TypeError: it is no trajectory, or a part of it is of another kind.
        ValueError: its target is none.
        OSError: the file cannot be written.

    """
    _check_trajectory(trajectory)
    if not Path(path).parent.is_dir() or Path(path).is_dir():
        raise OSError(f"path must be a file in a folder that exists, got {str(path)!r}. Make the folder first.")
    parts = {name: getattr(trajectory, name) for name in _PARTS}
    tensors = {name: tensor.detach().cpu().clone() for key, part in parts.items() for name, tensor in flatten(key, part)}
    metadata = {"format": _FORMAT, "afcache": __version__, "target": trajectory.target}
    if trajectory.origin is not None:
        metadata["origin"] = write_origin(trajectory.origin)
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}.") from error


def _check_trajectory(value: object) -> None:
    cure = "Keep a state of your own as Denoised(latents, states, records, target)."
    if not isinstance(value, Denoised):
        raise TypeError(f"trajectory must be what denoise returned, got {type(value).__name__}. {cure}")
    kinds: dict[str, tuple[str, bool]] = {
        "latents": ("a tensor", isinstance(value.latents, Tensor)),
        "states": ("a tuple of CacheState", _holds(value.states, CacheState)),
        "records": (
            "a list of tuples of StepRecord",
            isinstance(value.records, list) and all(_holds(step, StepRecord) for step in value.records),
        ),
        "origin": ("an Origin, or None", value.origin is None or isinstance(value.origin, Origin)),
    }
    for name, (kind, holds) in kinds.items():
        if not holds:
            raise TypeError(f"trajectory.{name} must be {kind}, got {show(getattr(value, name))}. {cure}")
    check_choice("trajectory.target", value.target, get_args(Target))


def _holds(values: object, kind: type) -> bool:
    return isinstance(values, tuple) and all(isinstance(each, kind) for each in values)


def load_checkpoint(path: str | Path, *, device: torch.device | str = "cpu") -> Denoised:
    """Read a trajectory.

    Args:
        path: of a file that `save_checkpoint` wrote.
        device: where the tensors go.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, lacks a part, or holds others.
        RuntimeError: torch knows no such device.

    """
    place = str(torch.device(device))
    if Path(path).is_dir():
        raise OSError(f"path must be a file that afcache.save_checkpoint wrote, got the folder {str(path)!r}.")
    try:
        with safe_open(path, framework="pt", device=place) as file:
            metadata = file.metadata() or {}
            found = metadata.get("format")
            tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one: {error}.") from error
    if found != _FORMAT:
        raise ValueError(
            f"{path} must have the format {_FORMAT!r}, got {found!r}. afcache.save_checkpoint writes one; files of earlier "
            "versions do not say what they are of: compute them again."
        )
    try:
        tree = unflatten(tensors)
        if not set(tree) <= set(_PARTS):
            raise KeyError(f"{sorted(set(tree) - set(_PARTS))}, which no trajectory has")
        states = tuple(build(CacheState, state) for state in items(tree.get("states", {})))
        records = [tuple(build(StepRecord, record) for record in items(step)) for step in items(tree.get("records", {}))]
        target: Any = metadata["target"]
        trajectory = Denoised(tree["latents"], states, records, target, read_origin(metadata.get("origin")))
        _check_trajectory(trajectory)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold the parts of a trajectory: {error}. afcache.save_checkpoint writes all of them, and no more."
        ) from error
    return trajectory
