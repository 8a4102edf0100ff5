"""Collectives as pure functions: they trace, inside torch.cond too, and return fresh tensors.

They are torch's functional collectives (`torch.ops._c10d_functional`), waited for at once. Groups of one rank communicate
nothing, and get their argument back.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_ops = torch.ops._c10d_functional


class Ranks(NamedTuple):
    """Processes that communicate; static.

    Attributes:
        name: of torch's process group.
        rank: this process's place in it.
        size: how many they are.

    """

    name: str = ""
    rank: int = 0
    size: int = 1


def all_sum(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum over ranks, the same bits on each."""
    if ranks.size == 1:
        return x
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", ranks.name))


def all_gather(x: Tensor, ranks: Ranks) -> Tensor:
    """`[...] -> [ranks, ...]`: everybody's tensor, in the order of ranks."""
    if ranks.size == 1:
        return x[None]
    gathered = _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous()[None], ranks.size, ranks.name))
    return gathered.view(ranks.size, *x.shape)


def all_to_all(x: Tensor, ranks: Ranks) -> Tensor:
    """`[ranks, ...] -> [ranks, ...]`: entry i goes to rank i; entry j of the result came from rank j."""
    if ranks.size == 1:
        return x
    splits = [1] * ranks.size
    return _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), splits, splits, ranks.name))


def shift(x: Tensor, ranks: Ranks) -> Tensor:
    """Send the tensor to the rank before, and return that of the rank after: one hop round the ring."""
    if ranks.size == 1:
        return x
    sent, received = [0] * ranks.size, [0] * ranks.size
    sent[(ranks.rank - 1) % ranks.size] = received[(ranks.rank + 1) % ranks.size] = 1
    return _ops.wait_tensor(_ops.all_to_all_single(x.contiguous()[None], received, sent, ranks.name))[0].contiguous()
