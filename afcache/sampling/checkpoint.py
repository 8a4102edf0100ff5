"""A trajectory on disk: latents, states and records, in one safetensors file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from afcache._version import __version__
from afcache.functional.state import CacheState, GateState, GroupRecord, GroupState, StepRecord
from afcache.sampling.result import Denoised

_FORMAT = "afcache checkpoint 2"


def save_checkpoint(trajectory: Denoised, path: str | Path) -> None:
    """Write a trajectory, finished or not, so that `denoise(start=load_checkpoint(path))` goes on bit by bit as it would have.

    Args:
        trajectory: what `denoise` returned, or `Denoised(latents, states, records, target)` of steps of your own.
        path: of the safetensors file.
    Cost:
        as many bytes as the states, which is the history for the most part.

    Raises:
        TypeError: it is no trajectory.

    """
    if not isinstance(trajectory, Denoised):
        raise TypeError(
            f"trajectory must be what denoise returned, got {type(trajectory).__name__}. Keep a state of your own as "
            "Denoised(latents, states, records, target)."
        )
    parts = trajectory._asdict()
    del parts["target"]
    tensors = {name: tensor.detach().cpu().clone() for key, part in parts.items() for name, tensor in _flatten(key, part)}
    save_file(tensors, path, metadata={"format": _FORMAT, "afcache": __version__, "target": trajectory.target})


def load_checkpoint(path: str | Path, *, device: torch.device | str = "cpu") -> Denoised:
    """Read a trajectory.

    Args:
        path: of a file that `save_checkpoint` wrote.
        device: where the tensors go.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, or lacks a part.
        RuntimeError: torch knows no such device.

    """
    place = str(torch.device(device))
    try:
        with safe_open(path, framework="pt", device=place) as file:
            metadata = file.metadata() or {}
            found = metadata.get("format")
            tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one: {error}.") from error
    if found != _FORMAT:
        raise ValueError(f"{path} must have the format {_FORMAT!r}, got {found!r}. afcache.save_checkpoint writes one.")
    tree = _unflatten(tensors)
    try:
        states = tuple(_build(CacheState, state) for state in _items(tree.get("states", {})))
        records = [tuple(_build(StepRecord, record) for record in _items(step)) for step in _items(tree.get("records", {}))]
        # Files of before there were others say nothing of their target.
        return Denoised(tree["latents"], states, records, metadata.get("target", "residual"))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} lacks a part of a trajectory: {error}. afcache.save_checkpoint writes all of them."
        ) from error


def _flatten(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested tuples by their paths, such as "states.0.history"."""
    if isinstance(value, Tensor):
        yield name, value
    if value is None or isinstance(value, Tensor):
        return
    for key, item in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
        yield from _flatten(f"{name}.{key}" if name else str(key), item)


def _unflatten(tensors: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *folders, leaf = name.split(".")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = tensor
    return tree


def _items(numbered: dict[str, Any]) -> list[Any]:
    return [numbered[str(index)] for index in range(len(numbered))]


def _build(kind: type[Any], values: dict[str, Any]) -> Any:
    """A named tuple; what it holds of others is known by their fields, and empty tuples have none."""
    return kind(**{name: _build_part(value) if isinstance(value, dict) else value for name, value in values.items()})


def _build_part(values: dict[str, Any]) -> Any:
    kinds = (kind for kind in (GateState, GroupState, GroupRecord) if set(kind._fields) == set(values))
    kind = next(kinds, None)
    return tuple(_items(values)) if kind is None else kind(**values)
