"""How samples of one kind become one batch, and are taken apart again: what `stack_samples` does, asked once."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from afcache.functional.samples import sample_axes


def kind_of(branches: tuple[Any, ...]) -> Hashable:
    """What values of one batch have in common: structure, shapes and dtypes, and what is no tensor."""
    leaves, structure = pytree.tree_flatten(branches)
    return str(structure), tuple((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)


def digest_of(branches: tuple[Any, ...]) -> Hashable:
    """The values of what samples of one batch share, such as positions: pictures of other sides can have as many of them.

    Cost:
        waits for the device.

    """
    tensors = [leaf for leaf in pytree.tree_leaves(branches) if isinstance(leaf, Tensor)]
    axes = [axis for each in branches for axis in sample_axes(each)]
    shared = [tensor for tensor, axis in zip(tensors, axes, strict=True) if axis is None]
    return tuple(hash(tensor.to("cpu", torch.float64).numpy().tobytes()) for tensor in shared)


class Together:
    """Values of one kind: NamedTuples of guidance branches, all of one sample.

    Args:
        example: one of them.

    """

    def __init__(self, example: tuple[Any, ...]) -> None:
        leaves, self._structure = pytree.tree_flatten(example)
        axes = iter([axis for each in example for axis in sample_axes(each)])
        self._axes = [next(axes) if isinstance(leaf, Tensor) else None for leaf in leaves]

    def stack(self, values: Sequence[tuple[Any, ...]]) -> Any:
        """One batch of them. What has no samples, such as positions, is the first one's."""
        columns = zip(*(pytree.tree_leaves(value) for value in values), strict=True)
        leaves = [
            column[0] if axis is None else torch.cat(column, axis) for column, axis in zip(columns, self._axes, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self._structure)

    def split(self, batch: Any, count: int) -> list[Any]:
        """Its first samples, each with memory of its own."""
        columns = [
            [leaf] * count if axis is None else [part.clone() for part in leaf.split(1, axis)[:count]]
            for leaf, axis in zip(pytree.tree_leaves(batch), self._axes, strict=True)
        ]
        return [pytree.tree_unflatten(list(leaves), self._structure) for leaves in zip(*columns, strict=True)]
