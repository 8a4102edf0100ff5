"""The cached forward and the denoising step around it, as pure functions of the state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from afcache._typing import Flag, Flags, HostModule, PerSample, Velocity, typed
from afcache.config import CacheConfig
from afcache.functional import control, forecast
from afcache.functional.attention import AttentionKernel
from afcache.functional.branch import branch
from afcache.functional.decision import decide, forecast_row, growth, predict_error
from afcache.functional.distance import relative_l2
from afcache.functional.stack import Embedded
from afcache.state import CacheState, Coupling, StepRecord, StepSchedule, solo

# Writes (history, newest residual, refresh flags) into the history's own memory.
HistoryWriter = Callable[[Tensor, Tensor, Tensor], None]


class Architecture(NamedTuple):
    """The parts of a diffusion transformer, as functions of the module that owns the weights.

    Attributes:
        embed: `(transformer, inputs) -> Embedded`.
        stack: `(transformer, inputs, embedded, kernel) -> hidden_states [batch, img_seq, dim]`.
        head: `(transformer, hidden_states, temb) -> velocity [batch, img_seq, channels]`.
        place: `(inputs, latents, sigma) -> inputs` of the same sample at another point of its trajectory.

    """

    embed: Callable[[HostModule, Any], Embedded]
    stack: Callable[[HostModule, Any, Embedded, AttentionKernel], Tensor]
    head: Callable[[HostModule, Tensor, Tensor], Tensor]
    place: Callable[[Any, Tensor, Tensor], Any]


class Forecast(NamedTuple):
    """A branch before the decision: its inputs to the blocks and what they are expected to return.

    Attributes:
        inputs: of the transformer.
        embedded: what the blocks would start from.
        velocity: v_hat, `[batch, img_seq, channels]`.
        orders: order of the row that made it; int64 `[batch]`.
        growth: g at this step by the law of that order; float32 `[batch]`.

    """

    inputs: Any
    embedded: Embedded
    velocity: Tensor
    orders: Tensor
    growth: Tensor


class Outcome(NamedTuple):
    """What either side of the decision returns for a branch, all fresh.

    Attributes:
        velocity: to step with, `[batch, img_seq, channels]`.
        measured_error: e of the samples, relative; NaN where nothing was measured; float32 `[batch]`.
        history: the next state's, `[nodes, batch, img_seq, dim]`; empty when it was written in place.

    """

    velocity: Tensor
    measured_error: Tensor
    history: tuple[Tensor, ...]


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
            memory, and `state` must not be used again.

    Returns:
        velocity `[batch, img_seq, channels]`; the next state, all tensors fresh; the record of the step.
    Cost:
        one copy of `state.history` on either side of the decision; with a `writer`, on refreshes only.

    """
    made = _forecast(transformer, inputs, state, schedule, architecture, config)
    refresh, predicted, accumulated = decide(state, schedule, coupling, config=config)
    is_computed = refresh.any()
    outcome = branch(
        is_computed,
        lambda: _compute(transformer, made, state, schedule, refresh, architecture, kernel, config, writer),
        lambda: _reuse(made, state, writer),
    )
    next_state, measured = _advance(state, schedule, config, refresh, made, outcome, accumulated)
    return outcome.velocity, next_state, _record(refresh, is_computed, predicted, measured, next_state)


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
        one decision, so one torch.cond, however many branches; one copy of every history.
    Reference:
        Ho, Salimans, 2022, arXiv 2207.12598 (guidance).

    """
    if not 1 <= len(inputs) <= 2:
        raise ValueError(f"inputs must have one entry for each guidance branch, one or two, got {len(inputs)}.")
    placed = [architecture.place(entry, latents, schedule.sigma) for entry in inputs]
    made = [
        _forecast(transformer, entry, state, schedule, architecture, config)
        for entry, state in zip(placed, states, strict=True)
    ]
    predicted = [predict_error(state, schedule, config=config) for state in states]
    coupling = _lead(predicted, guidance_scale)
    refresh, _, accumulated = decide(states[0], schedule, coupling, config=config)
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
    for m, state, outcome, error in zip(made, states, outcomes, predicted, strict=True):
        if next_states:
            accumulated = state.accumulated_error + control.contribution(error, schedule.sigma, schedule.sigma_next)
        next_state, measured = _advance(state, schedule, config, refresh, m, outcome, accumulated)
        next_states.append(next_state)
        records.append(_record(refresh, is_computed, error, measured, next_state))
    velocity = _guide([outcome.velocity for outcome in outcomes], guidance_scale)
    stepped = latents.to(torch.float32) + (schedule.sigma_next - schedule.sigma) * velocity
    return stepped.to(latents.dtype), tuple(next_states), tuple(records)


def _forecast(
    transformer: HostModule,
    inputs: Any,
    state: CacheState,
    schedule: StepSchedule,
    architecture: Architecture,
    config: CacheConfig,
) -> Forecast:
    embedded = architecture.embed(transformer, inputs)
    residual_hat = forecast.apply_row(forecast_row(state, schedule, config=config), state.history)
    orders = forecast.row_order(state.num_nodes, order=config.order)
    return Forecast(
        inputs=inputs,
        embedded=embedded,
        velocity=architecture.head(transformer, embedded.hidden_states + residual_hat, embedded.temb),
        orders=orders,
        growth=growth(state.nodes, orders, schedule.sigma, config=config),
    )


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
    hidden_states = architecture.stack(transformer, made.inputs, made.embedded, kernel)
    velocity = architecture.head(transformer, hidden_states, made.embedded.temb)
    measured = relative_l2(made.velocity, velocity)
    if config.correction:
        velocity = control.catch_up(
            velocity,
            made.velocity,
            lag=state.lag,
            growth=made.growth,
            sigma=schedule.sigma,
            sigma_next=schedule.sigma_next,
        )
    velocity = torch.where(rearrange(refresh, "batch -> batch 1 1"), velocity, made.velocity)
    residual = hidden_states - made.embedded.hidden_states
    if writer is None:
        return Outcome(velocity, measured, (forecast.push(state.history, residual, refresh),))
    writer(state.history, residual, refresh)
    return Outcome(velocity, measured, ())


def _reuse(made: Forecast, state: CacheState, writer: HistoryWriter | None) -> Outcome:
    unmeasured = torch.full_like(made.growth, float("nan"))
    return Outcome(made.velocity.clone(), unmeasured, (state.history.clone(),) if writer is None else ())


def _lead(predicted: list[PerSample], guidance_scale: PerSample) -> Coupling:
    """The leading branch's coupling: errors of the guided velocity weigh |s| and |1 - s|."""
    coupling = solo(predicted[0].shape[0], device=predicted[0].device)
    if len(predicted) == 1:
        return coupling
    return coupling._replace(weight=guidance_scale.abs(), others_error=(1 - guidance_scale).abs() * predicted[1])


def _guide(velocities: list[Velocity], guidance_scale: PerSample) -> Velocity:
    velocity, *others = (velocity.to(torch.float32) for velocity in velocities)
    for other in others:
        velocity = other + rearrange(guidance_scale, "batch -> batch 1 1") * (velocity - other)
    return velocity


def _record(refresh: Flags, is_computed: Flag, predicted: PerSample, measured: PerSample, next_state: CacheState) -> StepRecord:
    return StepRecord(
        refresh=refresh.clone(),
        is_computed=is_computed.clone(),
        predicted_error=predicted,
        measured_error=measured,
        accumulated_error=next_state.accumulated_error.clone(),
    )


def _advance(
    state: CacheState,
    schedule: StepSchedule,
    config: CacheConfig,
    refresh: Flags,
    made: Forecast,
    outcome: Outcome,
    accumulated: PerSample,
) -> tuple[CacheState, PerSample]:
    """The state after the step (refreshed samples start a new segment, the others extend theirs), and e where measured."""
    has_node = state.num_nodes > 0
    zeros = torch.zeros_like(accumulated)
    measured = torch.where(refresh & has_node, outcome.measured_error, torch.full_like(zeros, float("nan")))
    rate = torch.where(has_node, control.error_rate(measured, made.growth), torch.full_like(zeros, float("inf")))
    gap = torch.where(has_node, forecast.gap_to(state.nodes, schedule.sigma), zeros)
    lag = control.extend_lag(state.lag, made.growth, schedule.sigma, schedule.sigma_next)
    next_state = CacheState(
        history=outcome.history[0] if outcome.history else state.history,
        nodes=forecast.push(state.nodes, schedule.sigma.expand_as(zeros), refresh),
        steps=forecast.push(state.steps, schedule.step_index.expand_as(zeros), refresh),
        num_nodes=torch.where(refresh, (state.num_nodes + 1).clamp(max=config.order + 1), state.num_nodes),
        error_rate=torch.where(refresh, rate, state.error_rate),
        error_order=torch.where(refresh, made.orders, state.error_order),
        accumulated_error=torch.where(refresh, zeros, accumulated),
        last_gap=torch.where(refresh, gap, state.last_gap),
        lag=torch.where(refresh, zeros, lag),
    )
    return next_state, measured
