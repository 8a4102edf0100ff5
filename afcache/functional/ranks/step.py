"""The cached forward on one of several ranks: shard, take the step, gather.

Each rank embeds, forecasts and remembers its share of the tokens. Cached steps communicate the velocity at the end, and
statistics where the policy asks for some; refreshes also exchange keys and values inside every block.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from afcache._typing import HostModule
from afcache.functional.model import Architecture, AttentionKernel, Lengths
from afcache.functional.ranks.attention import SequenceRanks, sequence_attention
from afcache.functional.ranks.collectives import Ranks, all_gather, all_sum
from afcache.functional.ranks.exchange import Exchange
from afcache.functional.ranks.sharding import hide_padding, join_shards, take_shard
from afcache.functional.state import CacheState, Coupling, StepRecord, StepSchedule
from afcache.functional.step import HistoryWriter, cached_forward, full_forward
from afcache.settings.config import CacheConfig


class Layout(NamedTuple):
    """How the ranks that draw one image divide the work; static.

    Attributes:
        sequence: the ranks that share a guidance branch's tokens.
        cfg: the ranks that hold the same tokens of different guidance branches; at most two.
        replica: all of them, in the order cfg.rank * sequence.whole.size + sequence.whole.rank.
        checks: let all ranks vote on every decision (the debug option).

    """

    sequence: SequenceRanks = SequenceRanks()
    cfg: Ranks = Ranks()
    replica: Ranks = Ranks()
    checks: bool = False


def parallel_forward(
    transformer: HostModule,
    inputs: Any,
    state: CacheState,
    schedule: StepSchedule,
    coupling: Coupling,
    *,
    architecture: Architecture,
    kernel: AttentionKernel,
    config: CacheConfig,
    layout: Layout,
    writer: HistoryWriter | None = None,
) -> tuple[Tensor, CacheState, StepRecord]:
    """`cached_forward` of the guidance branch that this rank computes, over this rank's tokens.

    Args:
        transformer: owner of the weights; every rank has all of them.
        inputs: of the whole sequence, the same on all ranks of a branch.
        state: this rank's.
        schedule: where the step stands.
        coupling: decisions shared with guidance branches on this rank; `weight` is that of the branch.
        architecture: of the whole model.
        kernel: the attention kernel.
        config: settings; static.
        layout: how the ranks divide the work; static.
        writer: see `cached_forward`.

    Returns:
        velocities of all branches, `[cfg ranks, batch, img_seq, channels]`, the same bits on all ranks; the next state; the
        record.
    Cost:
        a cached step gathers the velocity and, with guidance branches or gates, sums a few numbers. A refresh adds
        `sequence_attention` in every block, and one sum of 2 * batch numbers.

    """
    local, mine, shared = _share(inputs, architecture, kernel, layout)
    velocity, next_state, record = cached_forward(
        transformer, mine, state, schedule, coupling, architecture=local, kernel=shared, config=config, writer=writer
    )
    return _gather(velocity, architecture, inputs, layout), next_state, record


def parallel_full_forward(
    transformer: HostModule, inputs: Any, *, architecture: Architecture, kernel: AttentionKernel, layout: Layout
) -> Tensor:
    """`full_forward` over this rank's tokens; velocities of all branches, `[cfg ranks, batch, img_seq, channels]`."""
    local, mine, shared = _share(inputs, architecture, kernel, layout)
    return _gather(full_forward(transformer, mine, architecture=local, kernel=shared), architecture, inputs, layout)


def _share(
    inputs: Any, architecture: Architecture, kernel: AttentionKernel, layout: Layout
) -> tuple[Architecture, Any, AttentionKernel]:
    """The model, the inputs and the attention of this rank."""
    assert architecture.axes is not None
    lengths, whole = architecture.axes.lengths(inputs), layout.sequence.whole
    mine = architecture.axes.split(inputs, lambda x, axis: take_shard(x, whole, dim=axis))
    local = architecture
    if whole.size > 1:
        local = hide_padding(architecture, lengths, whole, inputs.hidden_states.device)

    def shared(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sequence_attention(query, key, value, ranks=layout.sequence, lengths=lengths, kernel=kernel)

    attend = shared if whole.size > 1 else kernel
    return local._replace(exchange=exchange_of(layout, lengths)), mine, attend


def _gather(velocity: Tensor, architecture: Architecture, inputs: Any, layout: Layout) -> Tensor:
    assert architecture.axes is not None
    lengths = architecture.axes.lengths(inputs)
    shards = all_gather(velocity, layout.replica).unflatten(0, (layout.cfg.size, layout.sequence.whole.size))
    return torch.stack([join_shards(branch, lengths.img_seq) for branch in shards.unbind()])


def exchange_of(layout: Layout, lengths: Lengths) -> Exchange:
    """What the ranks of a layout tell each other.

    Sums come before comparisons, and are the same bits on every rank that shares a later collective: ranks that compared
    sums of their own could branch apart, and hang.
    """
    whole, cfg, replica = layout.sequence.whole, layout.cfg, layout.replica

    def of_leader(sums: Tensor) -> Tensor:
        return all_sum(sums if cfg.rank == 0 else torch.zeros_like(sums), replica)

    def follow(choice: Tensor) -> Tensor:
        if cfg.size == 1:
            return choice
        return all_sum(choice if replica.rank == 0 else torch.zeros_like(choice), replica)

    def gather_summary(summary: Tensor, txt_seq: int) -> tuple[Tensor, int]:
        if whole.size == 1:
            return summary, txt_seq
        shards = all_gather(summary, whole)
        image = shards[:, :, txt_seq:]
        text = join_shards(shards[:, :, :txt_seq], lengths.txt_seq)
        return torch.cat([text, join_shards(image, whole.size * image.shape[2])], dim=1), lengths.txt_seq

    def agree(codes: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not layout.checks:
            return codes, ()
        votes = all_gather(codes, replica)
        return votes.amin(dim=0), (votes,)

    return Exchange(
        over_tokens=lambda sums: all_sum(sums, whole),
        of_leader=of_leader,
        over_branches=lambda errors: all_sum(errors, cfg),
        follow=follow,
        gather_summary=gather_summary,
        agree=agree,
        shards=whole.size,
    )
