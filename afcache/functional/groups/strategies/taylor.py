"""High stability: forecast the group's residual by a row over its history."""

import torch

from afcache._typing import Row, typed
from afcache.functional.forecast import apply_row
from afcache.functional.groups.proposal import Memory, Proposal


@typed
def taylor(memory: Memory, row: Row) -> Proposal:
    """Propose the forecast residual; valid as soon as one residual is known.

    Args:
        memory: of the group.
        row: weights over its history.

    Reference:
        Liu et al., 2025, TaylorSeer, arXiv 2503.06923; there of every module, here of a group of blocks.

    """
    unknown = torch.full(memory.num_nodes.shape, float("nan"), device=memory.history.device)
    return Proposal(apply_row(row, memory.history), memory.num_nodes > 0, distance=unknown, threshold=unknown)
