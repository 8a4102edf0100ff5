"""One group of blocks at one step: look at its input, choose a strategy for each sample, carry it out."""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afcache._typing import Counts, Flags, HostModule, PerSample, Tokens, typed
from afcache.functional import forecast
from afcache.functional.distance import Reduction, no_reduction
from afcache.functional.groups.pooling import pool_tokens
from afcache.functional.groups.proposal import Memory, Proposal, settle
from afcache.functional.groups.strategies.attention import attention
from afcache.functional.groups.strategies.difference import difference
from afcache.functional.groups.strategies.similarity import similarity
from afcache.functional.model import AttentionKernel, Part, Parts
from afcache.functional.ranks.exchange import ALONE, Exchange
from afcache.functional.state import GroupState, StepSchedule
from afcache.settings.config import CacheConfig, Layerwise

# In the order of the stability classes. A choice is 0 (compute) or 1 + the index of a strategy.
STRATEGIES = ("taylor", "similarity", "attention", "difference")
_TAYLOR, _ATTENTION = 1, 3


class Model(NamedTuple):
    """The transformer at one step.

    Attributes:
        transformer: owner of the weights.
        inputs: what `Architecture.embed` takes.
        temb: conditioning vector `[batch, dim]`.
        txt_seq: text tokens.
        parts: how to run the stack part by part.
        kernel: the attention kernel.
        exchange: what ranks that take the step together tell each other.

    """

    transformer: HostModule
    inputs: Any
    temb: Tensor
    txt_seq: int
    parts: Parts
    kernel: AttentionKernel
    exchange: Exchange = ALONE


class Group(NamedTuple):
    """A group before its step.

    Attributes:
        part: its blocks.
        memory: what it remembers.
        forecast: what "taylor" proposes.
        stability_class: int64 `[batch]`.
        leader_choice: what it did in the guidance branch that leads; int64 `[batch]`.

    """

    part: Part
    memory: Memory
    forecast: Proposal
    stability_class: Tensor
    leader_choice: Tensor


class GroupOutcome(NamedTuple):
    """A group after its step.

    Attributes:
        memory: the next one.
        choice: 0 computed, else 1 + the index of the strategy followed; int64 `[batch]`.
        distance: the statistic of the strategy, NaN where it has none; float32 `[batch]`.
        threshold: what it was compared with, NaN where there is none; float32 `[batch]`.
        is_computed, is_partial: whether blocks, or MLPs alone, ran; bool, 0-d.
        votes: every rank's choice, under the debug option alone; int64 `[ranks, batch]`.

    """

    memory: Memory
    choice: Tensor
    distance: Tensor
    threshold: Tensor
    is_computed: Tensor
    is_partial: Tensor
    votes: tuple[Tensor, ...] = ()


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


def uses(settings: Layerwise, strategy: str) -> bool:
    """Whether any group may follow the strategy."""
    return settings.strategy in (strategy, "by_stability")


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
    tokens: Tokens,
    group: Group,
    schedule: StepSchedule,
    *,
    refresh: Flags,
    is_follower: Tensor,
    gain: PerSample,
    config: CacheConfig,
) -> tuple[Tokens, GroupOutcome]:
    """Take one step with one group.

    Args:
        model: the transformer at this step.
        tokens: the group's input, text first.
        group: what is known of it.
        schedule: where the step stands.
        refresh: samples that must compute.
        is_follower: 0-d bool; a follower does what the leading guidance branch did.
        gain: factor of the thresholds.
        config: settings; static.

    Returns:
        the group's output; what it did and remembers. All tensors fresh.
    Cost:
        see `settle`; one copy of the group's history.

    """
    settings, memory = config.layerwise, group.memory
    assert settings is not None
    seen = _look(model, tokens, group, settings)
    allowed = torch.where(refresh, torch.zeros_like(gain), gain)
    proposals = propose(seen, group, allowed, settings, reduction=model.exchange.over_tokens)
    choice, distance, threshold = choose(proposals, group.stability_class, refresh, settings)
    # A follower without a history computes, whatever the leader does.
    adopted = torch.where(memory.num_nodes > 0, group.leader_choice, torch.zeros_like(choice))
    choice = torch.where(is_follower, adopted, choice)
    if config.batch_decisions == "shared":
        choice = torch.where((choice == 0).any(), torch.zeros_like(choice), choice)
    choice, votes = model.exchange.agree(model.exchange.follow(choice))
    is_computed, is_partial = choice == 0, choice == _ATTENTION
    keeps_attention = uses(settings, "attention")

    def compute() -> tuple[Tensor, Tensor]:
        after, outputs = _run(model, tokens, group.part, None)
        return after, torch.stack(outputs) if keeps_attention else memory.attention.clone()

    after, attention_outputs = settle(
        tokens,
        torch.where((choice == _TAYLOR)[:, None, None], group.forecast.residual, memory.history[0]),
        memory.attention,
        is_computed=is_computed,
        is_partial=is_partial,
        compute=compute,
        recompute_mlps=(lambda: _run(model, tokens, group.part, memory.attention)[0]) if keeps_attention else None,
    )
    zeros = torch.zeros_like(distance)
    is_new = is_computed[:, None, None]
    next_memory = Memory(
        history=forecast.push(memory.history, after - tokens, is_computed),
        nodes=forecast.push(memory.nodes, schedule.sigma.expand_as(zeros), is_computed),
        steps=forecast.push(memory.steps, schedule.step_index.expand_as(zeros), is_computed),
        num_nodes=torch.where(is_computed, (memory.num_nodes + 1).clamp(max=config.num_nodes), memory.num_nodes),
        inputs=torch.where(is_new, seen.inputs.to(memory.inputs.dtype), memory.inputs),
        modulated=torch.where(is_new, seen.modulated.to(memory.modulated.dtype), memory.modulated),
        attention_map=torch.where(is_new, seen.attention_map, memory.attention_map),
        attention=attention_outputs,
    )
    return after, GroupOutcome(next_memory, choice, distance, threshold, is_computed.any(), is_partial.any(), votes)


def _run(model: Model, tokens: Tokens, part: Part, attention_outputs: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    after, outputs = model.parts.run(model.transformer, model.inputs, tokens, model.temb, model.kernel, part, attention_outputs)
    return after.clone(), outputs


def _look(model: Model, tokens: Tokens, group: Group, settings: Layerwise) -> Memory:
    """Summaries of the group's present input, in the fields of its memory; what no strategy asks for stays as it is."""
    seen, first, shards = group.memory, group.part.start, model.exchange.shards
    if uses(settings, "similarity"):
        seen = seen._replace(inputs=pool_tokens(tokens, txt_seq=model.txt_seq, shards=shards))
    if uses(settings, "difference") or uses(settings, "attention"):
        modulated = model.parts.modulate(model.transformer, tokens, model.temb, first, model.txt_seq)
        pooled = pool_tokens(modulated, txt_seq=model.txt_seq, shards=shards)
        if uses(settings, "difference"):
            seen = seen._replace(modulated=pooled)
        if uses(settings, "attention"):
            everything, txt_seq = model.exchange.gather_summary(pooled, model.txt_seq)
            attention_map = model.parts.attention_map(model.transformer, everything, first, txt_seq)
            seen = seen._replace(attention_map=attention_map)
    return seen


@typed
def propose(
    seen: Memory, group: Group, allowed: PerSample, settings: Layerwise, *, reduction: Reduction = no_reduction
) -> dict[str, Proposal]:
    """Ask every strategy that is in use.

    Args:
        seen: summaries of the present input.
        group: what is known of the group.
        allowed: factor of the thresholds; 0 for samples that must compute.
        settings: static.
        reduction: sums partial sums over ranks.

    """
    memory, proposals = group.memory, {}
    if uses(settings, "taylor"):
        proposals["taylor"] = group.forecast
    if uses(settings, "similarity"):
        proposals["similarity"] = similarity(
            memory, seen.inputs, threshold=settings.similarity_threshold * allowed, reduction=reduction
        )
    if uses(settings, "attention"):
        proposals["attention"] = attention(memory, seen.attention_map, threshold=settings.attention_threshold * allowed)
    if uses(settings, "difference"):
        proposals["difference"] = difference(
            memory, seen.modulated, threshold=settings.difference_threshold * allowed, reduction=reduction
        )
    return proposals


@typed
def choose(
    proposals: dict[str, Proposal], stability_class: Counts, refresh: Flags, settings: Layerwise
) -> tuple[Counts, PerSample, PerSample]:
    """The strategy of each sample's class if it is valid, else 0: compute; the statistic that told, and its threshold."""
    choice = torch.zeros_like(stability_class)
    distance = torch.full(refresh.shape, float("nan"), device=refresh.device)
    threshold = distance
    for code, name in enumerate(STRATEGIES):
        if name in proposals:
            is_its = stability_class == code if settings.strategy == "by_stability" else torch.ones_like(refresh)
            may_reuse = is_its & proposals[name].is_valid & ~refresh
            choice = torch.where(may_reuse, torch.full_like(choice, code + 1), choice)
            distance = torch.where(is_its, proposals[name].distance, distance)
            threshold = torch.where(is_its, proposals[name].threshold, threshold)
    return choice, distance, threshold.clone()
