"""What a strategy knows of a group of blocks, what it proposes, and how the proposal is carried out."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from afcache._typing import Flags, Tokens, typed
from afcache.functional.branch import branch


class Memory(NamedTuple):
    """One group's share of `GroupState`; the fields are its."""

    history: Tensor
    nodes: Tensor
    steps: Tensor
    num_nodes: Tensor
    inputs: Tensor
    modulated: Tensor
    attention_map: Tensor
    attention: Tensor


class Proposal(NamedTuple):
    """What a strategy would do for each sample.

    Attributes:
        residual: to add to the group's input; `[batch, seq, dim]`.
        is_valid: whether that is good enough; bool `[batch]`.
        distance: the statistic that met the threshold, NaN if there is none; float32 `[batch]`.
        threshold: the threshold, NaN if there is none; float32 `[batch]`.

    """

    residual: Tensor
    is_valid: Tensor
    distance: Tensor
    threshold: Tensor


@typed
def settle(
    tokens: Tokens,
    residual: Tokens,
    attention: Tensor,
    *,
    is_computed: Flags,
    is_partial: Flags,
    compute: Callable[[], tuple[Tensor, Tensor]],
    recompute_mlps: Callable[[], Tensor] | None,
) -> tuple[Tokens, Tensor]:
    """Carry out what was decided for a group: run it if any sample needs it, and give each sample its own result.

    Args:
        tokens: the group's input.
        residual: what reuse or forecast adds to it.
        attention: the attention outputs remembered, `[blocks, batch, seq, dim]`; without elements where none are kept.
        is_computed: samples whose blocks run.
        is_partial: other samples, whose MLPs run on remembered attention outputs.
        compute: returns the tokens after the blocks, and their attention outputs in the shape of `attention`; fresh.
        recompute_mlps: returns the tokens after MLPs on remembered attention outputs, fresh; None: no strategy asks for it.

    Returns:
        the tokens after the group, and its blocks' attention outputs, those of the other samples as they were; fresh.
    Cost:
        two host synchronisations at most; copies of tokens and attention outputs.

    """
    kept = tokens + residual
    if recompute_mlps is not None:
        reused = kept
        partial = branch(is_partial.any(), recompute_mlps, lambda: reused.clone())
        kept = torch.where(is_partial[:, None, None], partial, reused)
    computed, outputs = branch(is_computed.any(), compute, lambda: (kept.clone(), attention.clone()))
    return (
        torch.where(is_computed[:, None, None], computed, kept),
        torch.where(is_computed[None, :, None, None], outputs, attention),
    )
