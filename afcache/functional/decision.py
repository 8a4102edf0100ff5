"""What is known of a step before it is taken: which row forecasts it, its expected error, and whether to refresh."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from afcache._typing import Counts, Flags, Level, Nodes, PerSample, Row, Setting, Votes, typed
from afcache.functional import error_control, forecast
from afcache.functional.gates.gate import Observation, is_changed
from afcache.functional.groups.proposal import Memory
from afcache.functional.ranks.exchange import ALONE, Exchange
from afcache.functional.state import CacheState, Coupling, StepSchedule
from afcache.settings.config import CacheConfig


class Decision(NamedTuple):
    """What is decided at a step, and the estimates that it rests on.

    Attributes:
        refresh: which samples are computed in full.
        predicted_error: relative velocity error that the branch's own forecast is expected to have.
        accumulated_error: the estimate after the step, if it is forecast.
        votes: every rank's decision, under the debug option of parallel runs alone; see `StepRecord`.

    """

    refresh: Flags
    predicted_error: PerSample
    accumulated_error: PerSample
    votes: Votes | None = None


@typed
def forecast_row(state: CacheState | Memory, schedule: StepSchedule, *, config: CacheConfig) -> Row:
    """The row of weights that `config` names, damped, at this step, over the history of the stack or of one of its groups."""
    return forecast.damp_row(undamped_row(state, schedule, config=config), damping=damping_of(state, schedule))


@typed
def damping_of(state: CacheState | Memory, schedule: StepSchedule) -> Setting:
    """What has been learnt of the damping, or, until something has, what is set."""
    learnt = state.damping if isinstance(state, CacheState) else None
    return schedule.damping if learnt is None else torch.where(torch.isfinite(learnt), learnt, schedule.damping)


@typed
def undamped_row(state: CacheState | Memory, schedule: StepSchedule, *, config: CacheConfig) -> Row:
    """The row of weights that `config` names, at this step."""
    if config.forecast == "chebyshev":
        step_index = schedule.step_index.to(torch.float32)
        return forecast.chebyshev_row(state.steps, state.num_nodes, step_index, order=config.order)
    if config.forecast == "taylorseer":
        step_index = schedule.step_index.to(torch.float32)
        return forecast.taylorseer_row(state.steps, state.num_nodes, step_index, order=config.order)
    return forecast.polynomial_row(state.nodes, state.num_nodes, schedule.sigma, order=config.order)


@typed
def growth(nodes: Nodes, orders: Counts, sigma: Level, *, config: CacheConfig) -> PerSample:
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
        max_growth=schedule.max_growth,
        is_forced=schedule.is_forced,
    )


@typed
def decide(
    state: CacheState,
    schedule: StepSchedule,
    coupling: Coupling,
    observation: Observation | None = None,
    *,
    config: CacheConfig,
    exchange: Exchange = ALONE,
) -> Decision:
    """Decide which samples refresh at this step.

    Args:
        state: what the branch remembers.
        schedule: where the step stands.
        coupling: decisions shared with other guidance branches.
        observation: of the policy's gate; None without one.
        config: settings; static.
        exchange: what ranks that take the step together tell each other.

    """
    predicted = predict_error(state, schedule, config=config)
    step_error = exchange.over_branches(coupling.weight * predicted + coupling.others_error)
    added = error_control.contribution(
        step_error, schedule.sigma, schedule.sigma_next, weight=config.error_weight, early_weight=config.early_weight
    )
    accumulated = state.accumulated_error + added
    if config.rule.is_error_controlled:
        refresh = would_exceed(state, schedule, accumulated, config=config)
    elif observation is not None:
        assert state.gate is not None
        refresh = is_changed(state.gate, observation.change, schedule.is_forced, config=config) | (state.num_nodes == 0)
    else:
        refresh = schedule.is_forced | (state.num_nodes == 0)
    # A follower without a history (guidance switched on late) computes, whatever the leader does.
    refresh = torch.where(coupling.is_follower, coupling.leader_refresh | (state.num_nodes == 0), refresh)
    if config.batch_decisions == "shared":
        refresh = refresh.any().expand_as(refresh)
    return Decision(refresh, predicted, accumulated)


@typed
def compute_without_history(decision: Decision, others: list[CacheState]) -> Decision:
    """The decision, and a refresh where another branch of the call (guidance switched on late) has nothing to forecast from."""
    refresh = decision.refresh
    for state in others:
        refresh = refresh | (state.num_nodes == 0)
    return decision._replace(refresh=refresh)


@typed
def foresee(
    state: CacheState,
    others: tuple[CacheState, ...],
    schedule: StepSchedule,
    weight: PerSample,
    others_weight: PerSample,
    *,
    config: CacheConfig,
) -> Tensor:
    """Whether each sample would refresh at each of several steps, if all steps before it were forecast.

    A forecast measures nothing, so that until the next refresh the estimate depends on the schedule alone:

        accumulated_i = accumulated + sum_{j <= i} added_j,  added_j the contribution of w e_j + w' sum_others e_j

    Args:
        state: what the leading guidance branch remembers.
        others: what the other branches remember.
        schedule: of the steps, the next one first; every field has a leading axis of steps.
        weight: w, of the leading branch's predicted error.
        others_weight: w', of the others'.
        config: settings of policy "adaptive"; static.

    Returns:
        bool `[steps, batch]`; rows after a sample's first refresh say nothing of it.

    """

    def contribution(step: StepSchedule) -> Tensor:
        error = weight * predict_error(state, step, config=config)
        for other in others:
            error = error + others_weight * predict_error(other, step, config=config)
        return error_control.contribution(
            error, step.sigma, step.sigma_next, weight=config.error_weight, early_weight=config.early_weight
        )

    # One addition a step, in the order of the steps: the sums that the steps themselves will make.
    axes = StepSchedule(*(None if field is None else 0 for field in schedule))  # pyright: ignore[reportArgumentType]
    contributions = torch.vmap(contribution, in_dims=(axes,))(schedule).unbind()
    _, *sums = itertools.accumulate(contributions, initial=state.accumulated_error)
    accumulated = torch.stack(sums)
    exceed = torch.vmap(lambda step, error: would_exceed(state, step, error, config=config), in_dims=(axes, 0))
    refresh = exceed(schedule, accumulated)
    if config.batch_decisions == "shared":
        refresh = refresh.any(dim=1, keepdim=True).expand_as(refresh)
    return refresh
