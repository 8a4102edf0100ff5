"""What is known of a step once it is taken: the corrected velocity, the next state, the record."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from afcache._typing import Flag, Flags, PerSample, Velocity, typed
from afcache.functional import error_control, forecast
from afcache.functional.model import Embedded
from afcache.functional.rounding import above_floor
from afcache.functional.state import CacheState, Coupling, GroupRecord, GroupState, StepRecord, StepSchedule
from afcache.settings.config import CacheConfig


class Forecast(NamedTuple):
    """A branch before the decision: its inputs to the blocks and what they are expected to return.

    Attributes:
        inputs: of the transformer.
        embedded: image tokens and conditioning.
        start: what the cached blocks would start from.
        velocity: v_hat, `[batch, img_seq, channels]`.
        orders: order of the row that made it; int64 `[batch]`.
        growth: g at this step by the law of that order; float32 `[batch]`.

    """

    inputs: Any
    embedded: Embedded
    start: Tensor
    velocity: Tensor
    orders: Tensor
    growth: Tensor


class Sight(NamedTuple):
    """What a gate sees of a step; both empty under policies without one.

    Attributes:
        features: what it compares, float32 `[batch, img_seq, dim]`.
        change: its statistic, float32 `[batch]`.

    """

    features: tuple[Tensor, ...]
    change: tuple[Tensor, ...]


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
def correct(velocity: Velocity, made: Forecast, state: CacheState, schedule: StepSchedule) -> Velocity:
    """The computed velocity, with what earlier forecasts left out returned within it."""
    return error_control.catch_up(
        velocity,
        made.velocity,
        lag=state.lag,
        growth=made.growth,
        sigma=schedule.sigma,
        sigma_next=schedule.sigma_next,
    )


@typed
def record_step(
    refresh: Flags, is_computed: Flag, predicted: PerSample, measured: PerSample, next_state: CacheState
) -> StepRecord:
    """What the report will read; fresh."""
    return StepRecord(
        refresh=refresh.clone(),
        is_computed=is_computed.clone(),
        predicted_error=predicted,
        measured_error=measured,
        accumulated_error=next_state.accumulated_error.clone(),
    )


@typed
def follow(coupling: Coupling, record: StepRecord) -> Coupling:
    """The coupling of the guidance branches after the one that led: they do what it did."""
    choice = record.groups.choice if isinstance(record.groups, GroupRecord) else coupling.leader_choice
    return coupling._replace(
        is_follower=torch.ones_like(coupling.is_follower),
        leader_refresh=record.refresh,
        weight=torch.ones_like(coupling.weight),
        others_error=torch.zeros_like(coupling.others_error),
        leader_choice=choice,
    )


@typed
def advance(
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
    signal = above_floor(measured, schedule.noise_floor)
    rate = torch.where(has_node, error_control.error_rate(signal, made.growth), torch.full_like(zeros, float("inf")))
    gap = torch.where(has_node, forecast.gap_to(state.nodes, schedule.sigma), zeros)
    lag = error_control.extend_lag(state.lag, made.growth, schedule.sigma, schedule.sigma_next)
    next_state = CacheState(
        history=outcome.history[0] if outcome.history else state.history,
        nodes=forecast.push(state.nodes, schedule.sigma.expand_as(zeros), refresh),
        steps=forecast.push(state.steps, schedule.step_index.expand_as(zeros), refresh),
        num_nodes=torch.where(refresh, (state.num_nodes + 1).clamp(max=config.num_nodes), state.num_nodes),
        error_rate=torch.where(refresh, rate, state.error_rate),
        error_order=torch.where(refresh, made.orders, state.error_order),
        accumulated_error=torch.where(refresh, zeros, accumulated),
        last_gap=torch.where(refresh, gap, state.last_gap),
        lag=torch.where(refresh, zeros, lag),
    )
    return next_state, measured


@typed
def restart(state: CacheState, is_other: Flag) -> CacheState:
    """The state as at the start of a trajectory where the velocity has become another field's, else as it was.

    What is known of the errors of one field says nothing of another, and a jump between them is no error to catch up with.
    Residuals stay where they are: without nodes they count for nothing, and whatever the policy, the next step is computed.

    Args:
        state: what the branch remembers.
        is_other: whether it is of another field; 0-d.

    """

    def cleared(value: Tensor, empty: float = 0.0) -> Tensor:
        return torch.where(is_other, torch.full_like(value, empty), value)

    extras = state.extras
    if isinstance(extras, GroupState):
        extras = extras._replace(num_nodes=cleared(extras.num_nodes))
    return state._replace(
        num_nodes=cleared(state.num_nodes),
        error_rate=cleared(state.error_rate, float("inf")),
        error_order=cleared(state.error_order),
        last_gap=cleared(state.last_gap),
        lag=cleared(state.lag),
        extras=extras,
    )
