"""What a strategy knows of a group of blocks, what it proposes, and how the proposal is carried out."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from afcache._typing import AttentionMap, BlockOutputs, Counts, Flags, Nodes, PerSample, Summary, Tokens, typed
from afcache.functional.branch import branch


class Memory(NamedTuple):
    """One group's share of `GroupState`; the fields are its."""

    history: Float[Tensor, "nodes batch seq dim"]
    nodes: Nodes
    steps: Nodes
    num_nodes: Counts
    inputs: Summary
    modulated: Summary
    attention_map: AttentionMap
    attention: BlockOutputs


class Proposal(NamedTuple):
    """What a strategy would do for each sample.

    Attributes:
        residual: to add to the group's input; `[batch, seq, dim]`.
        is_valid: whether that is good enough; bool `[batch]`.
        distance: the statistic that met the threshold, NaN if there is none; float32 `[batch]`.
        threshold: the threshold, NaN if there is none; float32 `[batch]`.

    """

    residual: Tokens
    is_valid: Flags
    distance: PerSample
    threshold: PerSample


class Decided(NamedTuple):
    """What was decided for a group.

    Attributes:
        is_computed: samples whose blocks run.
        is_partial: other samples, whose MLPs run on remembered attention outputs.

    """

    is_computed: Flags
    is_partial: Flags


@typed
def carry_out(
    decided: Decided,
    kept: Tokens,
    attention: Tensor,
    *,
    compute: Callable[[], tuple[Tensor, Tensor]],
    recompute_mlps: Callable[[], Tensor] | None,
) -> tuple[Tokens, Tensor]:
    """Run a group if any sample needs it, and give each sample its own result.

    Args:
        decided: for each sample.
        kept: what reuse or forecast makes of the group's input.
        attention: the attention outputs remembered, `[blocks, batch, seq, dim]`; without tokens where none are kept.
        compute: returns the tokens after the blocks, and their attention outputs in the shape of `attention`; fresh.
        recompute_mlps: returns the tokens after MLPs on remembered attention outputs, fresh; None: no strategy asks for it.

    Returns:
        the tokens after the group, and its blocks' attention outputs, those of the other samples as they were; fresh.
    Cost:
        two host synchronisations at most; copies of tokens and attention outputs.

    """
    if recompute_mlps is not None:
        reused = kept
        partial = branch(decided.is_partial.any(), recompute_mlps, lambda: reused.clone())
        kept = torch.where(decided.is_partial[:, None, None], partial, reused)
    computed, outputs = branch(decided.is_computed.any(), compute, lambda: (kept.clone(), attention.clone()))
    return (
        torch.where(decided.is_computed[:, None, None], computed, kept),
        torch.where(decided.is_computed[None, :, None, None], outputs, attention),
    )
