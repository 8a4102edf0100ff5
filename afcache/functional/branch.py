"""The one place that knows how to branch on a tensor."""

from collections.abc import Callable
from typing import TypeVar

import torch

from afcache._typing import Flag

T = TypeVar("T")


def branch(predicate: Flag | bool, if_true: Callable[[], T], if_false: Callable[[], T]) -> T:
    """Run one of two closures: as torch.cond under compilation, as a Python `if` in eager mode.

    Eager torch.cond would start Dynamo, which costs seconds for every new closure.

    Args:
        predicate: 0-d bool; it may lie in the host's memory while everything else is on an accelerator. Or a Python bool,
            static: one side alone is traced.
        if_true, if_false: closures over tensors. Both return the same structure, shapes, dtypes and strides, made of fresh
            tensors: an input handed through must be cloned.
    Cost:
        one host synchronisation where the predicate lives on an accelerator.

    """
    if torch.compiler.is_compiling() and not isinstance(predicate, bool):
        return torch.cond(predicate, if_true, if_false, ())
    return if_true() if predicate else if_false()
