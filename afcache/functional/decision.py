"""What is known of a step before it is taken: which row forecasts it, its expected error, and whether to refresh."""

import torch

from afcache._typing import Counts, Flags, Nodes, PerSample, Row, Scalar, typed
from afcache.config import CacheConfig
from afcache.functional import control, forecast
from afcache.state import CacheState, Coupling, StepSchedule


@typed
def forecast_row(state: CacheState, schedule: StepSchedule, *, config: CacheConfig) -> Row:
    """The row of weights that `config` names, at this step."""
    if config.forecast == "taylorseer":
        step_index = schedule.step_index.to(torch.float32)
        row = forecast.taylorseer_row(state.steps, state.num_nodes, step_index, order=config.order)
    else:
        row = forecast.polynomial_row(state.nodes, state.num_nodes, schedule.sigma, order=config.order)
    return forecast.damp_row(row, damping=config.damping)


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
    if config.policy == "none":
        refresh = torch.ones_like(state.num_nodes, dtype=torch.bool)
    elif config.policy == "fixed":
        # Counted from the last warmup step, as TaylorSeer does.
        is_due = (schedule.step_index - (config.warmup_steps - 1)) % config.interval == 0
        refresh = (is_forced | is_due) | (state.num_nodes == 0)
    else:
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
