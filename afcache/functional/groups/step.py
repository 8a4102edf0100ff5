"""The cached forward group by group: each follows the strategy of its stability, or computes.

Refreshes of the whole stack are decided as everywhere; a refreshed sample's thresholds are 0, so that every group computes.
"""

from typing import Any

import torch
from torch import Tensor

from afcache._typing import Flags, HostModule, PerSample, Velocity, typed
from afcache.functional import error_control, forecast
from afcache.functional.decision import decide, forecast_row, growth
from afcache.functional.distance import relative_l2
from afcache.functional.groups import stability
from afcache.functional.groups.group import Group, GroupOutcome, Model, divide, estimate, memory_of, run_group
from afcache.functional.groups.proposal import Memory
from afcache.functional.groups.strategies.taylor import taylor
from afcache.functional.model import Architecture, AttentionKernel
from afcache.functional.rounding import above_floor
from afcache.functional.state import CacheState, Coupling, GroupRecord, GroupState, StepRecord, StepSchedule
from afcache.functional.update import Forecast, Outcome, advance, correct, record_step
from afcache.settings.config import CacheConfig, Layerwise


@typed
def layerwise_forward(
    transformer: HostModule,
    inputs: Any,
    state: CacheState,
    schedule: StepSchedule,
    coupling: Coupling,
    *,
    architecture: Architecture,
    kernel: AttentionKernel,
    config: CacheConfig,
) -> tuple[Velocity, CacheState, StepRecord]:
    """Take one step, group by group.

    A step counts as refreshed for a sample if all its groups computed, whoever asked for it: then e is measured, earlier
    forecasts are caught up with, and the thresholds' gain is adapted. v_hat is made of what the groups would add without
    looking at their inputs, so e is exact where all groups forecast or reuse.

    Args:
        transformer: owner of the weights.
        inputs: what `architecture.embed` takes.
        state: with `GroupState`.
        schedule: where the step stands.
        coupling: decisions shared with other guidance branches.
        architecture: the model's parts.
        kernel: the attention kernel.
        config: settings; static.

    Returns:
        velocity `[batch, img_seq, channels]`; the next state, all tensors fresh; the record of the step.
    Cost:
        two decisions for each group; copies of all histories and attention outputs.

    """
    parts, groups, exchange = architecture.parts, state.extras, architecture.exchange
    assert parts is not None
    assert isinstance(groups, GroupState)
    embedded = architecture.embed(transformer, inputs)
    tokens = parts.open(transformer, inputs, embedded)
    txt_seq = tokens.shape[1] - embedded.hidden_states.shape[1]
    model = Model(transformer, inputs, embedded.temb, txt_seq, parts, kernel, exchange)
    refresh, predicted, accumulated = decide(state, schedule, coupling, config=config, exchange=exchange)
    members = _members(model, groups, schedule, coupling, config)
    orders = forecast.row_order(state.num_nodes, order=config.order)
    made = Forecast(
        inputs=inputs,
        embedded=embedded,
        start=tokens,
        velocity=architecture.head(transformer, _expect(embedded.hidden_states, members, model, config), embedded.temb),
        orders=orders,
        growth=growth(state.nodes, orders, schedule.sigma, config=config),
    )
    outcomes: list[GroupOutcome] = []
    for member in members:
        tokens, outcome = run_group(
            model,
            tokens,
            member,
            schedule,
            refresh=refresh,
            is_follower=coupling.is_follower,
            gain=groups.gain,
            config=config,
        )
        outcomes.append(outcome)
    velocity = architecture.head(transformer, tokens[:, model.txt_seq :], embedded.temb)
    is_full = torch.stack([outcome.choice == 0 for outcome in outcomes]).all(dim=0)
    measured = relative_l2(made.velocity, velocity, reduction=exchange.over_tokens)
    if config.correction:
        velocity = torch.where(is_full[:, None, None], correct(velocity, made, state, schedule), velocity)
    outcome = Outcome(velocity, measured, (state.history.clone(),))
    next_state, measured = advance(state, schedule, config, is_full, made, outcome, accumulated)
    next_groups = _advance_groups(groups, outcomes, schedule, model, config)
    next_groups = next_groups._replace(gain=_adapt(groups.gain, state, made, measured, is_full, schedule, config))
    record = record_step(is_full, is_full.any(), predicted, measured, next_state)
    votes = tuple(vote for outcome in outcomes for vote in outcome.votes)
    record = record._replace(groups=_record(outcomes, next_groups), votes=votes)
    return velocity, next_state._replace(extras=next_groups), record


def _members(model: Model, groups: GroupState, schedule: StepSchedule, coupling: Coupling, config: CacheConfig) -> list[Group]:
    members = []
    for index, part in enumerate(divide(model.parts.num_blocks(model.transformer), config.num_groups)):
        memory = memory_of(groups, index, part)
        members.append(
            Group(
                part=part,
                memory=memory,
                forecast=taylor(memory, forecast_row(memory, schedule, config=config)),
                stability_class=groups.stability_class[index],
                leader_choice=coupling.leader_choice[index],
            )
        )
    return members


def _expect(hidden_states: Tensor, members: list[Group], model: Model, config: CacheConfig) -> Tensor:
    assert config.layerwise is not None
    for member in members:
        hidden_states = hidden_states + estimate(member, config.layerwise)[:, model.txt_seq :]
    return hidden_states


def _adapt(
    gain: PerSample,
    state: CacheState,
    made: Forecast,
    measured: PerSample,
    is_full: Flags,
    schedule: StepSchedule,
    config: CacheConfig,
) -> PerSample:
    """The thresholds' gain after the step."""
    assert config.layerwise is not None
    if not config.layerwise.adapt_thresholds:
        return gain.clone()
    incurred = state.lag.abs() * error_control.error_rate(above_floor(measured, schedule.noise_floor), made.growth)
    is_measured = is_full & (state.lag != 0)
    return stability.adapt_gain(gain, incurred, tolerance=schedule.tolerance, is_measured=is_measured)


def _advance_groups(
    groups: GroupState, outcomes: list[GroupOutcome], schedule: StepSchedule, model: Model, config: CacheConfig
) -> GroupState:
    """All groups after the step; the stability of those that computed is measured together."""
    settings: Layerwise | None = config.layerwise
    assert settings is not None
    kept = {name: torch.stack([getattr(outcome.memory, name) for outcome in outcomes]) for name in Memory._fields[:-1]}
    is_computed = torch.stack([outcome.choice == 0 for outcome in outcomes])
    is_measured = is_computed & (groups.num_nodes > 0)
    similar = stability.corrected_similarity(
        kept["history"][:, 0, :, model.txt_seq :],
        groups.history[:, 0, :, model.txt_seq :],
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
