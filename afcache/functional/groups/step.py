"""The cached forward group by group: each follows the strategy of its stability, or computes.

Refreshes of the whole stack are decided as everywhere; a refreshed sample's thresholds are 0, so that every group computes.
"""

import torch
from torch import Tensor

from afcache._typing import Flags, PerSample, typed
from afcache.functional import error_control, forecast
from afcache.functional.decision import Decision, decide, forecast_row, growth
from afcache.functional.distance import relative_l2
from afcache.functional.groups import stability
from afcache.functional.groups.group import Conditioning, Group, GroupOutcome, Request, divide, estimate, memory_of, run_group
from afcache.functional.groups.proposal import Memory
from afcache.functional.groups.strategies.taylor import taylor
from afcache.functional.model import Model, parts_of
from afcache.functional.rounding import above_floor
from afcache.functional.state import Coupling, GroupRecord, GroupState, StepRecord, StepSchedule
from afcache.functional.update import Branch, Opened, Outcome, Prepared, Taken, advance, correct, measure
from afcache.settings.config import CacheConfig


@typed
def take_groups(model: Model, before: Branch, schedule: StepSchedule, coupling: Coupling, *, config: CacheConfig) -> Taken:
    """Take one step, group by group.

    A step counts as refreshed for a sample if all its groups computed, whoever asked for it: then e is measured, earlier
    forecasts are caught up with, and the thresholds' gain is adapted. v_hat is made of what the groups would add without
    looking at their inputs, so e is exact where all groups forecast or reuse.

    Args:
        model: the transformer.
        before: the branch; its state has groups.
        schedule: where the step stands.
        coupling: decisions shared with other guidance branches.
        config: settings; static.

    Returns:
        the branch after the step.
    Cost:
        two decisions for each group; copies of all histories and attention outputs.

    """
    state, groups = before.state, before.state.groups
    assert groups is not None
    embedded = model.architecture.embed(model.transformer, before.inputs)
    tokens = parts_of(model).open(model.transformer, before.inputs, embedded)
    conditioning = Conditioning(before.inputs, embedded.temb, tokens.shape[1] - embedded.hidden_states.shape[1])
    decision = decide(state, schedule, coupling, config=config, exchange=model.exchange)
    members = _members(model, groups, schedule, coupling, config=config)
    expected = _expect(embedded.hidden_states, members, conditioning.txt_seq, config=config)
    orders = forecast.row_order(state.num_nodes, order=config.order)
    prepared = Prepared(
        inputs=before.inputs,
        state=state,
        opened=Opened(embedded, tokens),
        velocity=model.architecture.head(model.transformer, expected, embedded.temb),
        orders=orders,
        growth=growth(state.nodes, orders, schedule.sigma, config=config),
    )
    request = Request(schedule, decision.refresh, coupling.is_follower, groups.gain)
    outcomes: list[GroupOutcome] = []
    for member in members:
        tokens, outcome = run_group(model, conditioning, tokens, member, request, config=config)
        outcomes.append(outcome)
    velocity = model.architecture.head(model.transformer, tokens[:, conditioning.txt_seq :], embedded.temb)
    is_full = torch.stack([outcome.choice == 0 for outcome in outcomes]).all(dim=0)
    measured_error = relative_l2(prepared.velocity, velocity, reduction=model.exchange.over_tokens)
    if config.correction:
        velocity = torch.where(is_full[:, None, None], correct(velocity, prepared, schedule), velocity)
    outcome = measure(prepared, Outcome(velocity, measured_error, state.history.clone()), is_full)
    gain = _adapt(groups.gain, prepared, outcome, is_full, schedule, config=config)
    next_groups = _advance_groups(model, groups._replace(gain=gain), outcomes, schedule, conditioning.txt_seq, config=config)
    carried_out = Decision(is_full, decision.predicted_error, decision.accumulated_error)
    next_state = advance(prepared, outcome, carried_out, schedule, config=config, groups=next_groups)
    record = StepRecord(
        refresh=is_full.clone(),
        is_computed=is_full.any(),
        predicted_error=decision.predicted_error,
        measured_error=outcome.measured_error,
        accumulated_error=next_state.accumulated_error.clone(),
        groups=_record(outcomes, next_groups),
        votes=_votes(outcomes),
    )
    return Taken(velocity, next_state, record)


def _members(
    model: Model, groups: GroupState, schedule: StepSchedule, coupling: Coupling, *, config: CacheConfig
) -> list[Group]:
    members = []
    for index, part in enumerate(divide(model.sizes.num_blocks, config.num_groups)):
        memory = memory_of(groups, index, part)
        members.append(
            Group(
                part=part,
                memory=memory,
                forecast=taylor(memory, forecast_row(memory, schedule, config=config)),
                stability_class=groups.stability_class[index],
                leader_choice=None if coupling.leader_choice is None else coupling.leader_choice[index],
            )
        )
    return members


def _expect(hidden_states: Tensor, members: list[Group], txt_seq: int, *, config: CacheConfig) -> Tensor:
    """Image tokens after the stack, as far as that is known before any group runs."""
    assert config.layerwise is not None
    for member in members:
        hidden_states = hidden_states + estimate(member, config.layerwise)[:, txt_seq:]
    return hidden_states


def _adapt(
    gain: PerSample, prepared: Prepared, outcome: Outcome, is_full: Flags, schedule: StepSchedule, *, config: CacheConfig
) -> PerSample:
    """The thresholds' gain after the step."""
    assert config.layerwise is not None
    if not config.layerwise.adapt_thresholds:
        return gain.clone()
    lag, signal = prepared.state.lag, above_floor(outcome.measured_error, schedule.noise_floor)
    incurred = lag.abs() * error_control.error_rate(signal, prepared.growth)
    is_measured = is_full & (lag != 0)
    return stability.adapt_gain(gain, incurred, tolerance=schedule.tolerance, is_measured=is_measured)


def _advance_groups(
    model: Model,
    groups: GroupState,
    outcomes: list[GroupOutcome],
    schedule: StepSchedule,
    txt_seq: int,
    *,
    config: CacheConfig,
) -> GroupState:
    """All groups after the step, whose gain is known; the stability of those that computed is measured together."""
    settings = config.layerwise
    assert settings is not None
    kept = {name: torch.stack([getattr(outcome.memory, name) for outcome in outcomes]) for name in Memory._fields[:-1]}
    is_computed = torch.stack([outcome.choice == 0 for outcome in outcomes])
    is_measured = is_computed & (groups.num_nodes > 0)
    similar = stability.corrected_similarity(
        kept["history"][:, 0, :, txt_seq:],
        groups.history[:, 0, :, txt_seq:],
        (schedule.sigma - groups.nodes[:, 0]).abs(),
        reduction=model.exchange.over_tokens,
    )
    tracked = stability.track(
        groups.stability,
        similar,
        is_measured=is_measured,
        is_first=groups.num_measured == 0,
        decay=settings.stability_decay,
    )
    classes = stability.classify(
        tracked,
        groups.stability_class,
        is_first=groups.num_measured == 0,
        bounds=settings.stability_bounds,
        margin=settings.stability_margin,
    )
    return GroupState(
        **kept,
        attention=torch.cat([outcome.memory.attention for outcome in outcomes]),
        stability=tracked,
        stability_class=torch.where(is_measured, classes, groups.stability_class),
        num_measured=groups.num_measured + is_measured.to(torch.int64),
        gain=groups.gain,
    )


def _votes(outcomes: list[GroupOutcome]) -> Tensor | None:
    """Every rank's choices, group by group, under the debug option."""
    votes = [outcome.votes for outcome in outcomes if outcome.votes is not None]
    return torch.cat(votes) if votes else None


def _record(outcomes: list[GroupOutcome], groups: GroupState) -> GroupRecord:
    return GroupRecord(
        choice=torch.stack([outcome.choice for outcome in outcomes]),
        is_computed=torch.stack([outcome.is_computed for outcome in outcomes]),
        is_partial=torch.stack([outcome.is_partial for outcome in outcomes]),
        distance=torch.stack([outcome.distance for outcome in outcomes]),
        threshold=torch.stack([outcome.threshold for outcome in outcomes]),
        stability=groups.stability.clone(),
        stability_class=groups.stability_class.clone(),
        gain=groups.gain.clone(),
    )
