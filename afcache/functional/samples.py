"""Samples of one batch that are trajectories of their own: put together, chosen from, each at a step of its own.

A step treats every sample by itself, so that a batch of states, of inputs or of records is nothing but its samples, one after
the other along the axis that the annotation of a field calls `batch`. So requests that began at different times, with other
numbers of steps, share a call: stack their states, take a step, and take them apart again.
"""

import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from afcache.functional.process import Process
from afcache.functional.state import StepSchedule

T = TypeVar("T")
# (tensors of a field, axis of its samples or None where it has none, name of the field) -> tensor.
_Join = Callable[[list[Tensor], int | None, str], Tensor]


def stack_samples(values: Sequence[T]) -> T:
    """One batch of several: states of `init_state`, inputs of a family, records.

    Args:
        values: NamedTuples of one class, whose tensors agree in all but the batch; what has no batch, such as positions, must
            be equal.

    Returns:
        fresh; the samples of the first value before those of the second.

    Raises:
        ValueError: there are none, or they do not fit; the message names the field.
    Cost:
        one copy; a host synchronisation for each tensor that has no batch.

    """
    if not values:
        raise ValueError("values must hold at least one batch, got none.")
    return _join(list(values), type(values[0]), _concatenate, type(values[0]).__name__)


def take_samples(value: T, samples: Sequence[int]) -> T:
    """Some samples of a batch, in the order asked for.

    Args:
        value: a NamedTuple as of `stack_samples`.
        samples: their places in the batch; one that is named twice is there twice.

    Returns:
        fresh.

    Raises:
        ValueError: none is named, or one that the batch does not have.

    """
    if not samples:
        raise ValueError("samples must name at least one place in the batch, got none.")

    def choose(tensors: list[Tensor], axis: int | None, name: str) -> Tensor:
        (tensor,) = tensors
        if axis is None:
            return tensor.clone()
        size = tensor.shape[axis]
        if wrong := [index for index in samples if not 0 <= index < size]:
            raise ValueError(f"samples must be places from 0 to {size - 1} in {name}, got {wrong[0]}.")
        return tensor.index_select(axis, torch.tensor(samples, device=tensor.device))

    return _join([value], type(value), choose, type(value).__name__)


def move_samples(value: T, device: torch.device | str) -> T:
    """The same samples elsewhere: states of requests that wait can lie in the host's memory, and come back bit by bit.

    Args:
        value: a NamedTuple as of `stack_samples`.
        device: where its tensors go; those that are there already stay the same tensors.

    Raises:
        RuntimeError: torch knows no such device.
    Cost:
        one copy; on its way to the host, a host synchronisation.

    """
    place = torch.device(device)
    return _join([value], type(value), lambda tensors, axis, name: tensors[0].to(place), type(value).__name__)


def sample_axes(value: Any) -> tuple[int | None, ...]:
    """Where each tensor of a NamedTuple has its samples, in the order of its leaves; None where it has none."""
    found: list[int | None] = []

    def note(tensors: list[Tensor], axis: int | None, name: str) -> Tensor:
        del name
        found.append(axis)
        return tensors[0]

    _join([value], type(value), note, type(value).__name__)
    return tuple(found)


def stack_schedules(steps: Sequence[StepSchedule]) -> StepSchedule:
    """The step of a batch whose samples stand at steps of their own: every field is `[batch]`, a response `[window, batch]`.

    Args:
        steps: of one sample each: all fields 0-d, a response `[window]`.

    Raises:
        ValueError: there are none; one is of several samples; or some have a solver's response, or a process, and others none.

    """
    if not steps:
        raise ValueError("steps must hold the schedule of at least one sample, got none.")
    columns = zip(StepSchedule._fields, zip(*steps, strict=True), strict=True)
    return StepSchedule(*(_stack(column, name) for name, column in columns))


def _stack(column: tuple[Any, ...], name: str) -> Any:
    """One field of the schedules of several samples."""
    if without := [index for index, value in enumerate(column) if value is None]:
        if len(without) == len(column):
            return None
        raise ValueError(
            f"steps[{without[0]}] has no {name}, and others have one: samples that share a call share its kind of step."
        )
    if isinstance(column[0], Process):
        numbers = zip(Process._fields, zip(*column, strict=True), strict=True)
        return Process(*(_stack(values, f"process.{field}") for field, values in numbers))
    for index, value in enumerate(column):
        if value.ndim != (name == "response"):
            raise ValueError(f"steps[{index}].{name} must be of one sample, got shape {tuple(value.shape)}.")
    return torch.stack(column, dim=-1)


def _concatenate(tensors: list[Tensor], axis: int | None, name: str) -> Tensor:
    first, *others = tensors
    for index, other in enumerate(others, start=1):
        mine, its = ([size for place, size in enumerate(tensor.shape) if place != axis] for tensor in (first, other))
        if mine != its or (first.dtype, first.device) != (other.dtype, other.device):
            described = [f"{tuple(t.shape)}, {t.dtype}, {t.device}" for t in (first, other)]
            raise ValueError(
                f"{name} is {described[0]} in values[0] and {described[1]} in values[{index}]: one batch has one size."
            )
        if axis is None and not torch.equal(first, other):
            raise ValueError(f"{name} is shared by all samples, and is another in values[{index}] than in values[0].")
    return first.clone() if axis is None else torch.cat(tensors, axis)


def _join(values: list[Any], hint: Any, join: _Join, name: str) -> Any:
    """What `join` makes of every tensor of values of one structure, by the annotations of their fields."""
    hint = _without_none(hint)
    kinds = {type(value) for value in values}
    if len(kinds) > 1 or (isinstance(values[0], tuple) and len({len(value) for value in values}) > 1):
        raise ValueError(
            f"{name} differs in kind: {', '.join(sorted(kind.__name__ for kind in kinds))}. Make all with one config."
        )
    if isinstance(values[0], Tensor):
        return join(values, _axis(hint), name)
    if hasattr(values[0], "_asdict"):
        hints = typing.get_type_hints(type(values[0]))
        columns = zip(hints.items(), zip(*values, strict=True), strict=True)
        return type(values[0])(*(_join(list(column), inner, join, f"{name}.{field}") for (field, inner), column in columns))
    if isinstance(values[0], tuple):
        return tuple(_join(list(column), typing.get_args(hint)[0], join, name) for column in zip(*values, strict=True))
    if any(value != values[0] for value in values):
        raise ValueError(f"{name} is shared by all samples, and is {values[0]!r} for one and another for another.")
    return values[0]


def _without_none(hint: Any) -> Any:
    """The one kind of an optional field."""
    kinds = typing.get_args(hint)
    return kinds[kinds[0] is type(None)] if type(None) in kinds else hint


def _axis(hint: Any) -> int | None:
    """Where an annotated tensor has its samples."""
    axes = hint.dim_str.split()
    return axes.index("batch") if "batch" in axes else None
