"""What a rank tells the others at a step: collectives and bytes, by formula. `tests/parallel/test_parallel.py` counts them.

Every collective of `afcache.functional.ranks.step` has its line here. Bytes are those that one rank sends when collectives are
carried out directly: each peer is sent what it lacks, once.
"""

from typing import NamedTuple

from afcache.functional.model import Lengths, Sizes
from afcache.functional.ranks.step import Layout
from afcache.functional.shapes import coarse_length, shard_length
from afcache.settings.config import CacheConfig

_FLOAT32, _INT64 = 4, 8


class Traffic(NamedTuple):
    """What one rank takes part in.

    Attributes:
        collectives: how many it joins.
        bytes: that it sends to others.

    """

    collectives: int = 0
    bytes: int = 0


class Call(NamedTuple):
    """What the messages of a transformer call are made of.

    Attributes:
        batch: samples.
        lengths: tokens of the whole sequence.
        element: bytes of an element of the model's dtype.
        sizes: of the model.

    """

    batch: int
    lengths: Lengths
    element: int
    sizes: Sizes


def step_traffic(layout: Layout, call: Call, config: CacheConfig, *, is_computed: bool, evaluations: int) -> Traffic:
    """One transformer call.

    Args:
        layout: how the ranks divide the work.
        call: what is exchanged.
        config: settings.
        is_computed: whether a forecast was measured against computed blocks.
        evaluations: blocks that ran, attention included.

    """
    messages = [_repeat(attention_traffic(layout, call), evaluations), _velocity(layout, call)]
    if not config.rule.is_cached:
        return _total(messages)
    if config.forecasts_output:
        # Ranks hold the whole: they share out the forward, and adopt the errors that it shows.
        errors = layout.cfg.size * call.batch * _FLOAT32
        computed = [*messages, _sum(errors, layout.replica.size)] if is_computed else []
        return _total([*computed, _votes(layout, call)])
    messages.append(decision_traffic(layout, call, config))
    if is_computed and config.layerwise is None:
        messages.append(_sum(2 * call.batch * _FLOAT32, layout.sequence.whole.size))
    return _total(messages)


def attention_traffic(layout: Layout, call: Call) -> Traffic:
    """The attention of one block: Ulysses exchanges queries, keys, values and outputs; a ring hands on keys and values."""
    whole, ulysses, ring = layout.sequence
    tokens = sum(shard_length(length, whole.size) for length in call.lengths)
    shard = call.batch * tokens * call.sizes.dim * call.element
    # A row of tokens is as much longer as it has fewer heads.
    hops = _repeat(Traffic(1, 2 * shard), ring.size - 1)
    return _total([_scatter(3 * shard, ulysses.size), _scatter(shard, ulysses.size), hops])


def decision_traffic(layout: Layout, call: Call, config: CacheConfig) -> Traffic:
    """The statistics that a call sums before it decides where ranks hold shares, and the votes of the debug option."""
    whole, cfg, replica = layout.sequence.whole, layout.cfg, layout.replica
    row = call.batch * _FLOAT32
    errors = _sum(row, cfg.size)
    change = _sum(2 * row, replica.size) if config.rule.is_gated else Traffic()
    votes = _votes(layout, call)
    settings = config.layerwise
    if settings is None:
        return _total([errors, change, votes])
    each = [votes]
    if cfg.size > 1:
        each.append(_sum(call.batch * _INT64, replica.size))
    if settings.uses("similarity"):
        each.append(_sum(3 * row, whole.size))
    if settings.uses("difference"):
        each.append(_sum(2 * row, whole.size))
    if settings.uses("attention"):
        image = coarse_length(shard_length(call.lengths.img_seq, whole.size), whole.size)
        summary = shard_length(call.lengths.txt_seq, whole.size) + image
        each.append(_gather(call.batch * summary * call.sizes.dim * call.element, whole.size))
    # The measured error and the groups' stability are summed at every call.
    measured = [_sum(2 * row, whole.size), _sum(3 * config.num_groups * row, whole.size)]
    return _total([errors, change, _repeat(_total(each), config.num_groups), *measured])


def _votes(layout: Layout, call: Call) -> Traffic:
    return _gather(call.batch * _INT64, layout.replica.size) if layout.checks else Traffic()


def _total(messages: list[Traffic]) -> Traffic:
    return Traffic(sum(traffic.collectives for traffic in messages), sum(traffic.bytes for traffic in messages))


def _repeat(traffic: Traffic, times: int) -> Traffic:
    return Traffic(traffic.collectives * times, traffic.bytes * times)


def _velocity(layout: Layout, call: Call) -> Traffic:
    share = shard_length(call.lengths.img_seq, layout.sequence.whole.size)
    return _gather(call.batch * share * call.sizes.channels * call.element, layout.replica.size)


def _sum(size: int, ranks: int) -> Traffic:
    """All-reduce: each rank scatters its parts, and gathers the sums."""
    return Traffic(1, -(-2 * (ranks - 1) * size // ranks)) if ranks > 1 else Traffic()


def _gather(size: int, ranks: int) -> Traffic:
    return Traffic(1, (ranks - 1) * size) if ranks > 1 else Traffic()


def _scatter(size: int, ranks: int) -> Traffic:
    return Traffic(1, (ranks - 1) * size // ranks) if ranks > 1 else Traffic()
