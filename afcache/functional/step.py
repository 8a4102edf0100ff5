"""The cached forward and the denoising step around it, as pure functions of the state."""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from afcache._typing import Flags, HostModule, PerSample, Velocity, typed
from afcache.functional import error_control, forecast
from afcache.functional.branch import branch
from afcache.functional.decision import decide, forecast_row, growth, predict_error
from afcache.functional.distance import relative_l2
from afcache.functional.gates import gate
from afcache.functional.gates.sections import cross, enter, leave
from afcache.functional.groups.step import layerwise_forward
from afcache.functional.initial import solo
from afcache.functional.model import Architecture, AttentionKernel
from afcache.functional.ranks.exchange import agree_to_refresh
from afcache.functional.state import CacheState, Coupling, GateState, StepRecord, StepSchedule
from afcache.functional.update import Forecast, Outcome, Sight, advance, correct, follow, record_step
from afcache.settings.config import CacheConfig

# Writes (history, newest residual, refresh flags) into the history's own memory.
HistoryWriter = Callable[[Tensor, Tensor, Tensor], None]


@typed
def full_forward(transformer: HostModule, inputs: Any, *, architecture: Architecture, kernel: AttentionKernel) -> Tensor:
    """Compute the velocity without any cache: embed, all blocks, head.

    Args:
        transformer: owner of the weights.
        inputs: what `architecture.embed` takes.
        architecture: the model's parts.
        kernel: the attention kernel.

    Returns:
        velocity `[batch, img_seq, channels]`.

    """
    embedded = architecture.embed(transformer, inputs)
    hidden_states = architecture.stack(transformer, inputs, embedded, kernel)
    return architecture.head(transformer, hidden_states, embedded.temb)


@typed
def cached_forward(
    transformer: HostModule,
    inputs: Any,
    state: CacheState,
    schedule: StepSchedule,
    coupling: Coupling,
    *,
    architecture: Architecture,
    kernel: AttentionKernel,
    config: CacheConfig,
    writer: HistoryWriter | None = None,
) -> tuple[Velocity, CacheState, StepRecord]:
    """Compute or forecast the velocity of one step.

    The forecast v_hat is always made (its cost is one row over the history and the head). If any sample must refresh, the
    blocks run: its residual enters the history, e is measured against v_hat, and what earlier forecasts left out is
    returned within the velocity. All other samples keep v_hat.

    Args:
        transformer: owner of the weights.
        inputs: what `architecture.embed` takes.
        state: what the branch remembers.
        schedule: where the step stands.
        coupling: decisions shared with other guidance branches.
        architecture: the model's parts.
        kernel: the attention kernel.
        config: settings; static.
        writer: None keeps the function pure. Otherwise it updates `state.history` in place, the next state shares that
            memory, and `state` must not be used again. Layerwise steps do without.

    Returns:
        velocity `[batch, img_seq, channels]`; the next state, all tensors fresh; the record of the step.
    Cost:
        one host synchronisation where the state is on an accelerator; none where `coupling.known` holds the decision;
        one copy of `state.history` on either side of the decision; with a `writer`, on refreshes only.

    """
    if config.layerwise is not None:
        return layerwise_forward(
            transformer, inputs, state, schedule, coupling, architecture=architecture, kernel=kernel, config=config
        )
    made = prepare(transformer, inputs, state, schedule, architecture=architecture, kernel=kernel, config=config)
    seen = look(transformer, made, state, architecture=architecture, config=config)
    exchange = architecture.exchange
    refresh, predicted, accumulated = decide(state, schedule, coupling, *seen.change, config=config, exchange=exchange)
    refresh, votes = agree_to_refresh(refresh, exchange)
    refreshes = refresh.any()
    is_computed = coupling.known[0] if coupling.known else refreshes
    outcome = branch(
        is_computed,
        lambda: _compute(transformer, made, state, schedule, refresh, architecture, kernel, config, writer),
        lambda: _reuse(made, state, writer),
    )
    next_state, measured = advance(state, schedule, config, refresh, made, outcome, accumulated)
    next_state = next_state._replace(extras=_remember(state, seen, refresh, config))
    record = record_step(refresh, refreshes, predicted, measured, next_state)._replace(votes=votes)
    return outcome.velocity, next_state, record._replace(is_computed=is_computed) if coupling.known else record


@typed
def denoising_step(
    transformer: HostModule,
    inputs: tuple[Any, ...],
    latents: Velocity,
    states: tuple[CacheState, ...],
    schedule: StepSchedule,
    guidance_scale: PerSample,
    *,
    architecture: Architecture,
    kernel: AttentionKernel,
    config: CacheConfig,
) -> tuple[Velocity, tuple[CacheState, ...], tuple[StepRecord, ...]]:
    """Take one Euler step of the trajectory, with one decision for all guidance branches.

    x_{i+1} = x_i + (sigma_{i+1} - sigma_i) (v_2 + s (v_1 - v_2));  v_1 alone where there is one branch

    Args:
        transformer: owner of the weights.
        inputs: one entry for each guidance branch, the prompt's first; at most two. Their latents and timestep are
            replaced by `latents` and the schedule's sigma.
        latents: x_i.
        states: one entry for each guidance branch.
        schedule: where the step stands.
        guidance_scale: s per sample; unused without a second branch.
        architecture: the model's parts.
        kernel: the attention kernel.
        config: settings; static.

    Raises:
        ValueError: no or more than two branches.

    Returns:
        x_{i+1} in the dtype of `latents`; the next states; the record of each branch. All tensors fresh.
    Cost:
        one decision, so one torch.cond, however many branches (layerwise steps: two for each group and branch); one copy of
        every history.
    Reference:
        Ho, Salimans, 2022, arXiv 2207.12598 (guidance).

    """
    if not 1 <= len(inputs) <= 2:
        raise ValueError(f"inputs must have one entry for each guidance branch, one or two, got {len(inputs)}.")
    placed = [architecture.place(entry, latents, schedule.sigma) for entry in inputs]
    take = _take_layerwise if config.layerwise is not None else _take_together
    velocities, next_states, records = take(transformer, placed, states, schedule, guidance_scale, architecture, kernel, config)
    velocity = _guide(velocities, guidance_scale)
    stepped = latents.to(torch.float32) + (schedule.sigma_next - schedule.sigma) * velocity
    return stepped.to(latents.dtype), tuple(next_states), tuple(records)


def _take_together(
    transformer: HostModule,
    placed: list[Any],
    states: tuple[CacheState, ...],
    schedule: StepSchedule,
    guidance_scale: PerSample,
    architecture: Architecture,
    kernel: AttentionKernel,
    config: CacheConfig,
) -> tuple[list[Velocity], list[CacheState], list[StepRecord]]:
    """All branches inside one torch.cond."""
    made = [
        prepare(transformer, entry, state, schedule, architecture=architecture, kernel=kernel, config=config)
        for entry, state in zip(placed, states, strict=True)
    ]
    seen = [
        look(transformer, m, state, architecture=architecture, config=config) for m, state in zip(made, states, strict=True)
    ]
    predicted = [predict_error(state, schedule, config=config) for state in states]
    coupling = _lead(predicted, guidance_scale, config)
    refresh, _, accumulated = decide(states[0], schedule, coupling, *seen[0].change, config=config)
    # A branch without a history (guidance switched on late) has nothing to forecast from.
    for state in states[1:]:
        refresh = refresh | (state.num_nodes == 0)
    is_computed = refresh.any()
    outcomes = branch(
        is_computed,
        lambda: tuple(
            _compute(transformer, m, state, schedule, refresh, architecture, kernel, config, None)
            for m, state in zip(made, states, strict=True)
        ),
        lambda: tuple(_reuse(m, state, None) for m, state in zip(made, states, strict=True)),
    )
    next_states, records = [], []
    for m, sight, state, outcome, error in zip(made, seen, states, outcomes, predicted, strict=True):
        if next_states:
            accumulated = state.accumulated_error + error_control.contribution(error, schedule.sigma, schedule.sigma_next)
        next_state, measured = advance(state, schedule, config, refresh, m, outcome, accumulated)
        next_state = next_state._replace(extras=_remember(state, sight, refresh, config))
        next_states.append(next_state)
        records.append(record_step(refresh, is_computed, error, measured, next_state))
    return [outcome.velocity for outcome in outcomes], next_states, records


def _take_layerwise(
    transformer: HostModule,
    placed: list[Any],
    states: tuple[CacheState, ...],
    schedule: StepSchedule,
    guidance_scale: PerSample,
    architecture: Architecture,
    kernel: AttentionKernel,
    config: CacheConfig,
) -> tuple[list[Velocity], list[CacheState], list[StepRecord]]:
    """One branch after the other; those after the first do what it did, group by group."""
    predicted = [predict_error(state, schedule, config=config) for state in states]
    coupling = _lead(predicted, guidance_scale, config)
    velocities, next_states, records = [], [], []
    for entry, state in zip(placed, states, strict=True):
        velocity, next_state, record = layerwise_forward(
            transformer, entry, state, schedule, coupling, architecture=architecture, kernel=kernel, config=config
        )
        coupling = follow(coupling, record)
        velocities.append(velocity)
        next_states.append(next_state)
        records.append(record)
    return velocities, next_states, records


@typed
def prepare(
    transformer: HostModule,
    inputs: Any,
    state: CacheState,
    schedule: StepSchedule,
    *,
    architecture: Architecture,
    kernel: AttentionKernel,
    config: CacheConfig,
) -> Forecast:
    """What every step does before it decides: embed, run the first blocks, forecast, and apply last blocks and head."""
    embedded = architecture.embed(transformer, inputs)
    start = enter(transformer, inputs, embedded, architecture=architecture, kernel=kernel, config=config)
    residual_hat = forecast.apply_row(forecast_row(state, schedule, config=config), state.history)
    hidden_states = leave(
        transformer, inputs, embedded, start + residual_hat, architecture=architecture, kernel=kernel, config=config
    )
    orders = forecast.row_order(state.num_nodes, order=config.order)
    return Forecast(
        inputs=inputs,
        embedded=embedded,
        start=start,
        velocity=architecture.head(transformer, hidden_states, embedded.temb),
        orders=orders,
        growth=growth(state.nodes, orders, schedule.sigma, config=config),
    )


@typed
def look(
    transformer: HostModule, made: Forecast, state: CacheState, *, architecture: Architecture, config: CacheConfig
) -> Sight:
    """What the policy's gate sees of a step; nothing under policies without one."""
    if not config.is_gated:
        return Sight((), ())
    assert isinstance(state.extras, GateState)
    features = gate.observe(transformer, made.embedded, made.start, architecture=architecture, config=config)
    reduction = architecture.exchange.of_leader
    return Sight((features,), (gate.change(state.extras, features, config=config, reduction=reduction),))


def _remember(state: CacheState, seen: Sight, refresh: Flags, config: CacheConfig) -> tuple[Tensor, ...]:
    if not isinstance(state.extras, GateState):
        return ()
    (features,), (change,) = seen
    return gate.remember(state.extras, features, change, refresh, config=config)


def _compute(
    transformer: HostModule,
    made: Forecast,
    state: CacheState,
    schedule: StepSchedule,
    refresh: Flags,
    architecture: Architecture,
    kernel: AttentionKernel,
    config: CacheConfig,
    writer: HistoryWriter | None,
) -> Outcome:
    """Run the blocks; samples that do not refresh keep their forecast and their history."""
    inputs, embedded = made.inputs, made.embedded
    tokens = cross(transformer, inputs, embedded, made.start, architecture=architecture, kernel=kernel, config=config)
    hidden_states = leave(transformer, inputs, embedded, tokens, architecture=architecture, kernel=kernel, config=config)
    velocity = architecture.head(transformer, hidden_states, embedded.temb)
    measured = relative_l2(made.velocity, velocity, reduction=architecture.exchange.over_tokens)
    if config.correction:
        velocity = correct(velocity, made, state, schedule)
    velocity = torch.where(rearrange(refresh, "batch -> batch 1 1"), velocity, made.velocity)
    residual = tokens - made.start
    if writer is None:
        return Outcome(velocity, measured, (forecast.push(state.history, residual, refresh),))
    writer(state.history, residual, refresh)
    return Outcome(velocity, measured, ())


def _reuse(made: Forecast, state: CacheState, writer: HistoryWriter | None) -> Outcome:
    unmeasured = torch.full_like(made.growth, float("nan"))
    return Outcome(made.velocity.clone(), unmeasured, (state.history.clone(),) if writer is None else ())


def _lead(predicted: list[PerSample], guidance_scale: PerSample, config: CacheConfig) -> Coupling:
    """The leading branch's coupling: errors of the guided velocity weigh |s| and |1 - s|."""
    coupling = solo(predicted[0].shape[0], groups=config.num_groups, device=predicted[0].device)
    if len(predicted) == 1:
        return coupling
    return coupling._replace(weight=guidance_scale.abs(), others_error=(1 - guidance_scale).abs() * predicted[1])


def _guide(velocities: list[Velocity], guidance_scale: PerSample) -> Velocity:
    velocity, *others = (velocity.to(torch.float32) for velocity in velocities)
    for other in others:
        velocity = other + rearrange(guidance_scale, "batch -> batch 1 1") * (velocity - other)
    return velocity
