"""The step on one of several ranks: share, take the step, gather.

Where residuals are forecast, each rank embeds, forecasts and remembers its share of the tokens. Cached steps communicate the
velocity at the end, and statistics where the policy asks for some; refreshes also exchange keys and values inside every block.

Where the model's output is forecast, each rank forecasts and remembers the whole, and the model's forward alone is shared out:
a cached step communicates nothing.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from afcache.functional.model import Lengths, Model
from afcache.functional.outputs import full_forward
from afcache.functional.ranks.attention import SequenceRanks, sequence_attention
from afcache.functional.ranks.collectives import Ranks, all_gather, all_sum
from afcache.functional.ranks.exchange import Exchange
from afcache.functional.ranks.sharding import hide_padding, join_shards, take_shard


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


def share(model: Model, inputs: Any, layout: Layout) -> tuple[Model, Any]:
    """The model and the inputs as this rank sees them: its share of the tokens, attention over everybody's.

    A step taken with them is this rank's part of the step of all: `take` gives the shares of velocity and state.

    Args:
        model: the whole transformer; every rank has all of the weights.
        inputs: of the whole sequence, the same on all ranks of a guidance branch.
        layout: how the ranks divide the work; static.

    Cost:
        of a step: a cached one sums a few numbers with guidance branches, gates and groups. A refresh adds
        `sequence_attention` in every block, and one sum of 2 * batch numbers.

    """
    architecture, whole = model.architecture, layout.sequence.whole
    assert architecture.axes is not None
    lengths = architecture.axes.lengths(inputs)
    mine = architecture.axes.split(inputs, lambda x, axis: take_shard(x, whole, dim=axis))
    exchange = exchange_of(layout, lengths)
    if whole.size == 1:
        return model._replace(exchange=exchange), mine

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sequence_attention(query, key, value, ranks=layout.sequence, lengths=lengths, kernel=model.kernel)

    hidden = hide_padding(architecture, lengths, whole, inputs.hidden_states.device)
    return model._replace(architecture=hidden, kernel=kernel, exchange=exchange), mine


def gather(velocity: Tensor, model: Model, inputs: Any, layout: Layout) -> Tensor:
    """Everybody's shares of the velocity as a whole: of all branches, `[cfg ranks, batch, img_seq, channels]`.

    Args:
        velocity: this rank's share.
        model: the whole transformer.
        inputs: of the whole sequence.
        layout: how the ranks divide the work; static.

    Returns:
        the same bits on all ranks.
    Cost:
        one collective.

    """
    assert model.architecture.axes is not None
    lengths = model.architecture.axes.lengths(inputs)
    shards = all_gather(velocity, layout.replica).unflatten(0, (layout.cfg.size, layout.sequence.whole.size))
    return torch.stack([join_shards(branch, lengths.img_seq) for branch in shards.unbind()])


def forward_together(model: Model, inputs: Any, layout: Layout) -> Tensor:
    """Compute the velocity without any cache, each rank its share: the whole of all branches, as of `gather`.

    Args:
        model: the whole transformer.
        inputs: of the whole sequence.
        layout: how the ranks divide the work; static.

    Cost:
        `sequence_attention` in every block, and the gathering.

    """
    local, mine = share(model, inputs, layout)
    return gather(full_forward(local, mine), model, inputs, layout)


def share_forward(model: Model, layout: Layout) -> Model:
    """The model with a forward that ranks share out, for steps that forecast its output.

    Latents, states and velocities are whole on every rank, and so is a step that is taken with it. Where guidance branches are
    on different ranks, each gives the inputs of its own branch in the place of all.

    Args:
        model: the whole transformer.
        layout: how the ranks divide the work; static.

    Cost:
        of a step: a cached one nothing. A refresh `forward_together`, and one sum of branches * batch numbers.

    """
    if layout.replica.size == 1:
        return model

    def forward(whole: Model, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        del whole
        if layout.cfg.size == 1:
            return tuple(forward_together(model, its, layout)[0] for its in inputs)
        return tuple(velocity.clone() for velocity in forward_together(model, inputs[0], layout).unbind())

    return model._replace(architecture=model.architecture._replace(forward=forward), exchange=exchange_of_wholes(layout))


def exchange_of_wholes(layout: Layout) -> Exchange:
    """What ranks tell each other that each hold the whole of a step: the error that the first of them has measured."""
    return Exchange(adopt_error=lambda error: _of_first(error, layout.replica), agree=lambda codes: _agree(codes, layout))


def exchange_of(layout: Layout, lengths: Lengths) -> Exchange:
    """What the ranks of a layout that hold shares of a step tell each other.

    Sums come before comparisons, and are the same bits on every rank that shares a later collective: ranks that compared
    sums of their own could branch apart, and hang.
    """
    whole, cfg, replica = layout.sequence.whole, layout.cfg, layout.replica

    def of_leader(sums: Tensor) -> Tensor:
        return all_sum(sums if cfg.rank == 0 else torch.zeros_like(sums), replica)

    def adopt(choice: Tensor) -> Tensor:
        return choice if cfg.size == 1 else _of_first(choice, replica)

    def gather_summary(summary: Tensor, txt_seq: int) -> tuple[Tensor, int]:
        if whole.size == 1:
            return summary, txt_seq
        shards = all_gather(summary, whole)
        image = shards[:, :, txt_seq:]
        text = join_shards(shards[:, :, :txt_seq], lengths.txt_seq)
        return torch.cat([text, join_shards(image, whole.size * image.shape[2])], dim=1), lengths.txt_seq

    return Exchange(
        over_tokens=lambda sums: all_sum(sums, whole),
        of_leader=of_leader,
        over_branches=lambda errors: all_sum(errors, cfg),
        adopt=adopt,
        gather_summary=gather_summary,
        agree=lambda codes: _agree(codes, layout),
        shards=whole.size,
    )


def _of_first(x: Tensor, ranks: Ranks) -> Tensor:
    """What the first rank has, the same bits on each."""
    return all_sum(x if ranks.rank == 0 else torch.zeros_like(x), ranks)


def _agree(codes: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """The smallest code over ranks, and every rank's: under the debug option alone."""
    if not layout.checks:
        return codes, None
    votes = all_gather(codes, layout.replica)
    return votes.amin(dim=0), votes[None]
