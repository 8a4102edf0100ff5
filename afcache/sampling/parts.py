"""Values of a trajectory as tensors by their names, for files; and back."""

import json
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from torch import Tensor

from afcache.sampling.origin import Origin


def write_origin(origin: Origin) -> str:
    """As JSON."""
    return json.dumps(origin._asdict())


def read_origin(text: str | None) -> Origin | None:
    """What `write_origin` wrote; None of None."""
    if text is None:
        return None
    values: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in json.loads(text).items()}
    return Origin(**values)


def flatten(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested tuples by their paths, such as "states.0.history"."""
    if isinstance(value, Tensor):
        yield name, value
    if value is None or isinstance(value, Tensor):
        return
    for key, item in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
        yield from flatten(f"{name}.{key}" if name else str(key), item)


def unflatten(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tree of which `flatten` gave the leaves.

    Raises:
        KeyError: a tensor holds others.

    """
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *folders, leaf = name.split(".")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                raise KeyError(f"{name!r} is below a tensor")
        if leaf in place:
            raise KeyError(f"{name!r} is a tensor and holds others")
        place[leaf] = tensor
    return tree


def items(numbered: Any) -> list[Any]:
    """The entries 0, 1, ... of a level of the tree.

    Raises:
        KeyError: they are not numbered so.

    """
    if not isinstance(numbered, dict) or set(numbered) != {str(index) for index in range(len(numbered))}:
        found = sorted(numbered) if isinstance(numbered, dict) else "a tensor"
        raise KeyError(f"entries must be numbered from 0, got {found}")
    return [numbered[str(index)] for index in range(len(numbered))]


def build(kind: type[Any], values: Any) -> Any:
    """A named tuple; what it holds of others is known by the annotations of its fields.

    Raises:
        KeyError, TypeError: parts are missing, or there are others.

    """
    if not isinstance(values, dict):
        raise KeyError(f"{kind.__name__} must hold tensors by their names, got a tensor")
    hints = get_type_hints(kind)
    return kind(**{name: _build_part(hints.get(name), value) for name, value in values.items()})


def _build_part(hint: Any, value: Any) -> Any:
    """A field of a named tuple: a tensor, or a named tuple of its own."""
    if not isinstance(value, dict):
        return value
    kinds = (each for each in (hint, *get_args(hint)) if isinstance(each, type) and hasattr(each, "_fields"))
    kind = next(kinds, None)
    return tuple(items(value)) if kind is None else build(kind, value)
