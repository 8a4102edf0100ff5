"""What is known of a step before it is taken: which row forecasts it, its expected error, and whether to refresh."""

import torch

from afcache._typing import Counts, Flags, Nodes, PerSample, Row, Scalar, typed
from afcache.functional import error_control, forecast
from afcache.functional.gates import gate
from afcache.functional.groups.proposal import Memory
from afcache.functional.ranks.exchange import ALONE, Exchange
from afcache.functional.state import CacheState, Coupling, GateState, StepSchedule
from afcache.settings.config import CacheConfig


@typed
def forecast_row(state: CacheState | Memory, schedule: StepSchedule, *, config: CacheConfig) -> Row:
    """The row of weights that `config` names, at this step, over the history of the stack or of one of its groups."""
    if config.forecast == "chebyshev":
        step_index = schedule.step_index.to(torch.float32)
        row = forecast.chebyshev_row(state.steps, state.num_nodes, step_index, order=config.order)
    elif config.forecast == "taylorseer":
        step_index = schedule.step_index.to(torch.float32)
        row = forecast.taylorseer_row(state.steps, state.num_nodes, step_index, order=config.order)
    else:
        row = forecast.polynomial_row(state.nodes, state.num_nodes, schedule.sigma, order=config.order)
    return forecast.damp_row(row, damping=config.damping)


@typed
def growth(nodes: Nodes, orders: Counts, sigma: Scalar, *, config: CacheConfig) -> PerSample:
    """The growth law g that `config` names, for an error made by rows of the given orders."""
    if config.error_law == "remainder":
        return error_control.remainder_growth(nodes, orders, sigma)
    return error_control.power_growth(nodes, orders, sigma, exponent=config.growth_exponent)


@typed
def predict_error(state: CacheState, schedule: StepSchedule, *, config: CacheConfig) -> PerSample:
    """The relative velocity error that a forecast of this step is expected to have.

    The law follows the tag of the measurement: an error measured on the order-0 row grows like that of order 0.
    """
    law = growth(state.nodes, state.error_order, schedule.sigma, config=config)
    return error_control.predicted_error(state.error_rate, law)


@typed
def would_exceed(state: CacheState, schedule: StepSchedule, accumulated: PerSample, *, config: CacheConfig) -> Flags:
    """Which samples error control refreshes at a step, given the estimate that they would have after a forecast."""
    return error_control.should_refresh(
        accumulated,
        tolerance=schedule.tolerance,
        gap=forecast.gap_to(state.nodes, schedule.sigma),
        last_gap=state.last_gap,
        max_growth=config.max_growth,
        is_forced=schedule.is_forced,
    )


@typed
def decide(
    state: CacheState,
    schedule: StepSchedule,
    coupling: Coupling,
    change: PerSample | None = None,
    *,
    config: CacheConfig,
    exchange: Exchange = ALONE,
) -> tuple[Flags, PerSample, PerSample]:
    """Decide which samples refresh at this step.

    Args:
        state: what the branch remembers.
        schedule: where the step stands.
        coupling: decisions shared with other guidance branches.
        change: the statistic of the policy's gate; None without one.
        config: settings; static.
        exchange: what ranks that take the step together tell each other.

    Returns:
        the decision; the branch's own predicted error; the accumulated estimate if the step is forecast.

    """
    predicted = predict_error(state, schedule, config=config)
    step_error = exchange.over_branches(coupling.weight * predicted + coupling.others_error)
    accumulated = state.accumulated_error + error_control.contribution(step_error, schedule.sigma, schedule.sigma_next)
    if config.policy == "adaptive":
        refresh = would_exceed(state, schedule, accumulated, config=config)
    elif isinstance(state.extras, GateState):
        assert change is not None
        refresh = gate.is_changed(state.extras, change, schedule.is_forced, config=config) | (state.num_nodes == 0)
    else:
        refresh = schedule.is_forced | (state.num_nodes == 0)
    # A follower without a history (guidance switched on late) computes, whatever the leader does.
    refresh = torch.where(coupling.is_follower, coupling.leader_refresh | (state.num_nodes == 0), refresh)
    if config.batch_decisions == "shared":
        refresh = refresh.any().expand_as(refresh)
    return refresh, predicted, accumulated
