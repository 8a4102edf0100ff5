"""What ranks that take a step together tell each other outside of the blocks; alone, nothing."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from afcache.functional.distance import Reduction, no_reduction


def _gather_nothing(tokens: Tensor, txt_seq: int) -> tuple[Tensor, int]:
    return tokens, txt_seq


def _agree_alone(codes: Tensor) -> tuple[Tensor, None]:
    return codes, None


class Exchange(NamedTuple):
    """How ranks agree on a step. The defaults are one process's.

    Attributes:
        over_tokens: sums `[count, batch]` partial sums over the ranks that hold a guidance branch's tokens.
        of_leader: the same for what only the leading guidance branch says; other branches contribute nothing.
        over_branches: sums weighted errors over the guidance branches that other ranks compute.
        adopt: what the leading branch's first rank has in place of this rank's; as it is where no branch is elsewhere.
        adopt_error: the errors `[branches, batch]` that the first rank has measured in place of this rank's, where each
            measures them over everything: later decisions rest on them, and such sums may differ in the last bit. As they are
            where sums are shared.
        gather_summary: `(summary [batch, coarse, dim], txt_seq) -> (everybody's, txt_seq)`, text first.
        agree: `codes [batch]` (0: compute) -> the smallest over ranks, and every rank's `[1, ranks, batch]`; outside of the
            debug option the codes as they are, and None.
        shards: how many ranks share the tokens of a branch.

    """

    over_tokens: Reduction = no_reduction
    of_leader: Reduction = no_reduction
    over_branches: Callable[[Tensor], Tensor] = no_reduction
    adopt: Callable[[Tensor], Tensor] = no_reduction
    adopt_error: Callable[[Tensor], Tensor] = no_reduction
    gather_summary: Callable[[Tensor, int], tuple[Tensor, int]] = _gather_nothing
    agree: Callable[[Tensor], tuple[Tensor, Tensor | None]] = _agree_alone
    shards: int = 1


ALONE = Exchange()
