"""One group of blocks at one step: summarise its input, choose a strategy for each sample, carry it out."""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afcache._typing import Counts, Flag, Flags, PerSample, Tokens, Vector, Votes, typed
from afcache.functional import forecast
from afcache.functional.distance import Reduction, no_reduction
from afcache.functional.groups.pooling import pool_tokens
from afcache.functional.groups.proposal import Decided, Memory, Proposal, carry_out
from afcache.functional.groups.strategies.table import CODES, STRATEGIES
from afcache.functional.model import Model, Part, parts_of
from afcache.functional.state import GroupState, StepSchedule
from afcache.settings.config import CacheConfig, Layerwise


class Conditioning(NamedTuple):
    """What the blocks of every group are given besides tokens.

    Attributes:
        inputs: what the architecture's `embed` takes.
        temb: conditioning vector `[batch, dim]`.
        txt_seq: text tokens.

    """

    inputs: Any
    temb: Vector
    txt_seq: int


class Request(NamedTuple):
    """What the step asks of all groups alike.

    Attributes:
        schedule: where the step stands.
        refresh: samples that must compute.
        is_follower: a follower does what the leading guidance branch did.
        gain: factor of the thresholds.

    """

    schedule: StepSchedule
    refresh: Flags
    is_follower: Flag
    gain: PerSample


class Group(NamedTuple):
    """A group before its step.

    Attributes:
        part: its blocks.
        memory: what it remembers.
        forecast: what "taylor" proposes.
        stability_class: of each sample.
        leader_choice: what it did in the guidance branch that leads; None in the leader.

    """

    part: Part
    memory: Memory
    forecast: Proposal
    stability_class: Counts
    leader_choice: Counts | None


class GroupOutcome(NamedTuple):
    """A group after its step.

    Attributes:
        memory: the next one.
        choice: 0 computed, else 1 + the index of the strategy followed.
        distance: the statistic of the strategy, NaN where it has none.
        threshold: what it was compared with, NaN where there is none.
        is_computed, is_partial: whether blocks, or MLPs alone, ran.
        votes: every rank's choice, under the debug option alone.

    """

    memory: Memory
    choice: Counts
    distance: PerSample
    threshold: PerSample
    is_computed: Flag
    is_partial: Flag
    votes: Votes | None = None


@typed
def divide(num_blocks: int, groups: int) -> list[Part]:
    """Contiguous groups of blocks, as equal as they can be; the first are the longer ones.

    Raises:
        ValueError: more groups than blocks.

    """
    if groups > num_blocks:
        raise ValueError(f"groups must be at most the number of blocks, {num_blocks}, got {groups}.")
    short, longer = divmod(num_blocks, groups)
    lengths = [short + (index < longer) for index in range(groups)]
    edges = itertools.accumulate(lengths, initial=0)
    return [Part(start, stop) for start, stop in itertools.pairwise(edges)]


@typed
def memory_of(groups: GroupState, index: int, part: Part) -> Memory:
    """A group's share of the state."""
    kept = {name: getattr(groups, name)[index] for name in Memory._fields[:-1]}
    return Memory(**kept, attention=groups.attention[part.start : part.stop])


@typed
def estimate(group: Group, settings: Layerwise) -> Tokens:
    """What the group would add to its input on a cached step, as far as that is known without its input."""
    if settings.strategy == "taylor":
        return group.forecast.residual
    if settings.strategy != "by_stability":
        return group.memory.history[0]
    is_forecast = group.stability_class == 0
    return torch.where(is_forecast[:, None, None], group.forecast.residual, group.memory.history[0])


@typed
def run_group(
    model: Model,
    conditioning: Conditioning,
    tokens: Tokens,
    group: Group,
    request: Request,
    *,
    config: CacheConfig,
) -> tuple[Tokens, GroupOutcome]:
    """Take one step with one group.

    Args:
        model: the transformer.
        conditioning: of this step.
        tokens: the group's input, text first.
        group: what is known of it.
        request: to all groups.
        config: settings; static.

    Returns:
        the group's output; what it did and remembers. All tensors fresh.
    Cost:
        see `carry_out`; one copy of the group's history.

    """
    settings, memory = config.layerwise, group.memory
    assert settings is not None
    present = _summarise(model, conditioning, tokens, group, settings)
    allowed = torch.where(request.refresh, torch.zeros_like(request.gain), request.gain)
    proposals = propose(present, group, allowed, settings, reduction=model.exchange.over_tokens)
    choice, distance, threshold = choose(proposals, group.stability_class, request.refresh, settings)
    choice, votes = _agree(model, choice, group, request, config=config)
    decided = Decided(is_computed=choice == 0, is_partial=choice == CODES["attention"])
    keeps_attention = settings.uses("attention")

    def compute() -> tuple[Tensor, Tensor]:
        after, outputs = _run(model, conditioning, tokens, group.part, None)
        return after, torch.stack(outputs) if keeps_attention else memory.attention.clone()

    is_forecast = (choice == CODES["taylor"])[:, None, None]
    after, attention_outputs = carry_out(
        decided,
        tokens + torch.where(is_forecast, group.forecast.residual, memory.history[0]),
        memory.attention,
        compute=compute,
        recompute_mlps=(lambda: _run(model, conditioning, tokens, group.part, memory.attention)[0])
        if keeps_attention
        else None,
    )
    zeros, schedule, is_computed = torch.zeros_like(distance), request.schedule, decided.is_computed
    is_new = is_computed[:, None, None]
    next_memory = Memory(
        history=forecast.push(memory.history, after - tokens, is_computed),
        nodes=forecast.push(memory.nodes, schedule.sigma.expand_as(zeros), is_computed),
        steps=forecast.push(memory.steps, schedule.step_index.expand_as(zeros), is_computed),
        num_nodes=torch.where(is_computed, (memory.num_nodes + 1).clamp(max=config.num_nodes), memory.num_nodes),
        inputs=torch.where(is_new, present.inputs.to(memory.inputs.dtype), memory.inputs),
        modulated=torch.where(is_new, present.modulated.to(memory.modulated.dtype), memory.modulated),
        attention_map=torch.where(is_new, present.attention_map, memory.attention_map),
        attention=attention_outputs,
    )
    flags = is_computed.any(), decided.is_partial.any()
    return after, GroupOutcome(next_memory, choice, distance, threshold, *flags, votes)


def _agree(
    model: Model, choice: Tensor, group: Group, request: Request, *, config: CacheConfig
) -> tuple[Tensor, Tensor | None]:
    """The choice that all branches, samples and ranks share which have to; and every rank's, under the debug option."""
    if group.leader_choice is not None:
        # A follower without a history computes, whatever the leader does.
        adopted = torch.where(group.memory.num_nodes > 0, group.leader_choice, torch.zeros_like(choice))
        choice = torch.where(request.is_follower, adopted, choice)
    if config.batch_decisions == "shared":
        choice = torch.where((choice == 0).any(), torch.zeros_like(choice), choice)
    return model.exchange.agree(model.exchange.adopt(choice))


def _run(
    model: Model, conditioning: Conditioning, tokens: Tensor, part: Part, attention_outputs: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    run = parts_of(model).run
    after, outputs = run(model, conditioning.inputs, tokens, conditioning.temb, part, attention_outputs)
    return after.clone(), outputs


def _summarise(model: Model, conditioning: Conditioning, tokens: Tensor, group: Group, settings: Layerwise) -> Memory:
    """Summaries of the group's present input, in the fields of its memory; what no strategy asks for stays as it is."""
    present, first, txt_seq = group.memory, group.part.start, conditioning.txt_seq
    parts, shards = parts_of(model), model.exchange.shards
    if settings.uses("similarity"):
        present = present._replace(inputs=pool_tokens(tokens, txt_seq=txt_seq, shards=shards))
    if settings.uses("difference") or settings.uses("attention"):
        modulated = parts.modulate(model.transformer, tokens, conditioning.temb, first, txt_seq)
        pooled = pool_tokens(modulated, txt_seq=txt_seq, shards=shards)
        if settings.uses("difference"):
            present = present._replace(modulated=pooled)
        if settings.uses("attention"):
            everything, length = model.exchange.gather_summary(pooled, txt_seq)
            attention_map = parts.attention_map(model.transformer, everything, first, length)
            present = present._replace(attention_map=attention_map)
    return present


@typed
def propose(
    present: Memory, group: Group, allowed: PerSample, settings: Layerwise, *, reduction: Reduction = no_reduction
) -> dict[str, Proposal]:
    """Ask every strategy that is in use.

    Args:
        present: summaries of the present input.
        group: what is known of the group.
        allowed: factor of the thresholds; 0 for samples that must compute.
        settings: static.
        reduction: sums partial sums over ranks.

    """
    proposals = {}
    for strategy in STRATEGIES:
        if not settings.uses(strategy.name):
            continue
        if strategy.propose is None:
            proposals[strategy.name] = group.forecast
        else:
            threshold = getattr(settings, f"{strategy.name}_threshold") * allowed
            proposals[strategy.name] = strategy.propose(group.memory, present, threshold, reduction)
    return proposals


@typed
def choose(
    proposals: dict[str, Proposal], stability_class: Counts, refresh: Flags, settings: Layerwise
) -> tuple[Counts, PerSample, PerSample]:
    """The strategy of each sample's class if it is valid, else 0: compute; the statistic that told, and its threshold."""
    choice = torch.zeros_like(stability_class)
    distance = torch.full(refresh.shape, float("nan"), device=refresh.device)
    threshold = distance
    for name, code in CODES.items():
        if name in proposals:
            is_its = stability_class == code - 1 if settings.strategy == "by_stability" else torch.ones_like(refresh)
            may_reuse = is_its & proposals[name].is_valid & ~refresh
            choice = torch.where(may_reuse, torch.full_like(choice, code), choice)
            distance = torch.where(is_its, proposals[name].distance, distance)
            threshold = torch.where(is_its, proposals[name].threshold, threshold)
    return choice, distance, threshold.clone()
