"""The cached forward: one transformer call with its decision, as a pure function of the state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afcache._typing import Counts, Flags, HostModule, Nodes, PerSample, Scalar, Velocity, typed
from afcache.config import CacheConfig
from afcache.functional import control, forecast
from afcache.functional.attention import AttentionKernel
from afcache.functional.branch import branch
from afcache.functional.distance import relative_l2
from afcache.functional.stack import Embedded
from afcache.state import CacheState, Coupling, StepRecord, StepSchedule


class Architecture(NamedTuple):
    """The three parts of a diffusion transformer, as functions of the module that owns the weights.

    Attributes:
        embed: `(transformer, inputs) -> Embedded`.
        stack: `(transformer, embedded, kernel) -> hidden_states [batch, img_seq, dim]`.
        head: `(transformer, hidden_states, temb) -> velocity [batch, img_seq, channels]`.

    """

    embed: Callable[[HostModule, Any], Embedded]
    stack: Callable[[HostModule, Embedded, AttentionKernel], Tensor]
    head: Callable[[HostModule, Tensor, Tensor], Tensor]


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
    return architecture.head(transformer, architecture.stack(transformer, embedded, kernel), embedded.temb)


@typed
def growth(nodes: Nodes, orders: Counts, sigma: Scalar, *, config: CacheConfig) -> PerSample:
    """The growth law g that `config` names, for an error made by rows of the given orders."""
    if config.error_law == "remainder":
        return control.remainder_growth(nodes, orders, sigma)
    return control.power_growth(nodes, orders, sigma, exponent=config.growth_exponent)


@typed
def predict_error(state: CacheState, schedule: StepSchedule, *, config: CacheConfig) -> PerSample:
    """The relative velocity error that a forecast of this step is expected to have.

    The law follows the tag of the measurement: an error measured on the order-0 row grows like that of order 0.
    """
    law = growth(state.nodes, state.error_order, schedule.sigma, config=config)
    return control.predicted_error(state.error_rate, law)


@typed
def decide(
    state: CacheState, schedule: StepSchedule, coupling: Coupling, *, config: CacheConfig
) -> tuple[Flags, PerSample, PerSample]:
    """Decide which samples refresh at this step.

    Returns:
        the decision; the branch's own predicted error; the accumulated estimate if the step is forecast.

    """
    predicted = predict_error(state, schedule, config=config)
    step_error = coupling.weight * predicted + coupling.others_error
    accumulated = state.accumulated_error + control.contribution(step_error, schedule.sigma, schedule.sigma_next)
    is_forced = schedule.step_index < config.warmup_steps
    if config.refresh_last_step:
        is_forced = is_forced | (schedule.step_index == schedule.num_steps - 1)
    refresh = control.should_refresh(
        accumulated,
        tolerance=schedule.tolerance,
        gap=forecast.gap_to(state.nodes, schedule.sigma),
        last_gap=state.last_gap,
        max_growth=config.max_growth,
        is_forced=is_forced,
    )
    # A follower without a history (guidance switched on late) computes, whatever the leader does.
    refresh = torch.where(coupling.is_follower, coupling.leader_refresh | (state.num_nodes == 0), refresh)
    if config.batch_decisions == "shared":
        refresh = refresh.any().expand_as(refresh)
    return refresh, predicted, accumulated


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

    Returns:
        velocity `[batch, img_seq, channels]`; the next state, all tensors fresh; the record of the step.
    Cost:
        one copy of `state.history` on either branch.

    """
    embedded = architecture.embed(transformer, inputs)
    orders = forecast.row_order(state.num_nodes, order=config.order)
    row = forecast.polynomial_row(state.nodes, state.num_nodes, schedule.sigma, order=config.order)
    row = forecast.damp_row(row, damping=config.damping)
    residual_hat = forecast.apply_row(row, state.history)
    velocity_hat = architecture.head(transformer, embedded.hidden_states + residual_hat, embedded.temb)
    refresh, predicted, accumulated = decide(state, schedule, coupling, config=config)
    law = growth(state.nodes, orders, schedule.sigma, config=config)

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        hidden_states = architecture.stack(transformer, embedded, kernel)
        velocity = architecture.head(transformer, hidden_states, embedded.temb)
        measured = relative_l2(velocity_hat, velocity)
        if config.correction:
            velocity = control.catch_up(
                velocity,
                velocity_hat,
                lag=state.lag,
                growth=law,
                sigma=schedule.sigma,
                sigma_next=schedule.sigma_next,
            )
        history = forecast.push(state.history, hidden_states - embedded.hidden_states, refresh)
        return torch.where(refresh[:, None, None], velocity, velocity_hat), history, measured

    def reuse() -> tuple[Tensor, Tensor, Tensor]:
        return velocity_hat.clone(), state.history.clone(), torch.full_like(predicted, float("nan"))

    is_computed = refresh.any()
    velocity, history, measured = branch(is_computed, compute, reuse)
    is_measured = refresh & (state.num_nodes > 0)
    measured = torch.where(is_measured, measured, torch.full_like(measured, float("nan")))
    next_state = _advance(state, schedule, config, refresh, history, measured, accumulated, law, orders)
    record = StepRecord(
        refresh=refresh.clone(),
        is_computed=is_computed,
        predicted_error=predicted,
        measured_error=measured,
        accumulated_error=next_state.accumulated_error.clone(),
    )
    return velocity, next_state, record


def _advance(
    state: CacheState,
    schedule: StepSchedule,
    config: CacheConfig,
    refresh: Tensor,
    history: Tensor,
    measured: Tensor,
    accumulated: Tensor,
    law: Tensor,
    orders: Tensor,
) -> CacheState:
    """The state after the step: refreshed samples start a new segment, the others extend theirs."""
    has_node = state.num_nodes > 0
    zeros = torch.zeros_like(accumulated)
    unmeasured = torch.full_like(measured, float("inf"))
    rate = torch.where(has_node, control.error_rate(measured, law), unmeasured)
    gap = torch.where(has_node, forecast.gap_to(state.nodes, schedule.sigma), zeros)
    lag = control.extend_lag(state.lag, law, schedule.sigma, schedule.sigma_next)
    return CacheState(
        history=history,
        nodes=forecast.push(state.nodes, schedule.sigma.expand_as(zeros), refresh),
        num_nodes=torch.where(refresh, (state.num_nodes + 1).clamp(max=config.order + 1), state.num_nodes),
        error_rate=torch.where(refresh, rate, state.error_rate),
        error_order=torch.where(refresh, orders, state.error_order),
        accumulated_error=torch.where(refresh, zeros, accumulated),
        last_gap=torch.where(refresh, gap, state.last_gap),
        lag=torch.where(refresh, zeros, lag),
    )
