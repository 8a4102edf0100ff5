"""What is known of a guidance branch as a step goes on: before it, before the decision, after either side of it, at the end."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from afcache._typing import Counts, Flag, Flags, History, Kept, PerSample, Tokens, Velocity, typed
from afcache.functional import error_control, forecast
from afcache.functional.decision import Decision
from afcache.functional.gates.gate import Observation, remember
from afcache.functional.model import Embedded
from afcache.functional.rounding import above_floor
from afcache.functional.solver_response import respond
from afcache.functional.state import CacheState, GroupState, Lead, SolverState, StepRecord, StepSchedule
from afcache.settings.config import CacheConfig


class Branch(NamedTuple):
    """A guidance branch before its step.

    Attributes:
        inputs: what the architecture's `embed` takes.
        state: what the branch remembers.

    """

    inputs: Any
    state: CacheState


class Opened(NamedTuple):
    """Where the blocks would start.

    Attributes:
        embedded: image tokens and conditioning.
        start: what the cached blocks would start from.

    """

    embedded: Embedded
    start: Tokens


class Prepared(NamedTuple):
    """A guidance branch before the decision, with what the model is expected to return.

    Attributes:
        inputs, state: as in `Branch`.
        velocity: v_hat.
        orders: order of the row that made it.
        growth: g at this step by the law of that order.
        opened: where the blocks would start; None where the model's output is forecast.
        observation: of the policy's gate; None under policies without one.

    """

    inputs: Any
    state: CacheState
    velocity: Velocity
    orders: Counts
    growth: PerSample
    opened: Opened | None = None
    observation: Observation | None = None


class Computed(NamedTuple):
    """A guidance branch computed in full.

    Attributes:
        velocity: v.
        kept: what the history keeps of it.
        error: what its forecast was off by, relative; None until that is measured.
        damping: of the forecasts after it, where that is learnt.

    """

    velocity: Velocity
    kept: Kept
    error: PerSample | None = None
    damping: PerSample | None = None


class Outcome(NamedTuple):
    """What either side of the decision returns for a branch, all fresh.

    Attributes:
        velocity: to step with.
        measured_error: e of the samples, relative; NaN where nothing was measured.
        history: the next state's; without elements where it was written in place.
        computed: v without correction, where another branch will measure its error by it; else empty: torch.cond returns no
            None.
        damping: as of `CacheState`; empty where it is not learnt.

    """

    velocity: Velocity
    measured_error: PerSample
    history: History | Float[Tensor, " none"]
    computed: tuple[Velocity, ...] = ()
    damping: tuple[PerSample, ...] = ()


class Taken(NamedTuple):
    """A guidance branch after its step; all tensors fresh.

    Attributes:
        velocity: to step with.
        state: the next one.
        record: what the step did.
        lead: for the branch after it, where branches are called one after the other.

    """

    velocity: Velocity
    state: CacheState
    record: StepRecord
    lead: Lead | None = None


def written_in_place(history: History) -> Tensor:
    """What stands for a history that a writer has updated."""
    return history.new_zeros(0)


@typed
def correct(velocity: Velocity, prepared: Prepared, schedule: StepSchedule) -> Velocity:
    """The computed velocity, with what earlier forecasts left out returned within it."""
    return error_control.catch_up(
        velocity,
        prepared.velocity,
        lag=prepared.state.lag,
        growth=prepared.growth,
        sigma=schedule.sigma,
        sigma_next=schedule.sigma_next,
    )


@typed
def answer(prepared: Prepared, outcome: Outcome, refresh: Flags, schedule: StepSchedule) -> tuple[Velocity, SolverState | None]:
    """The velocity of a step, with what earlier forecasts left out returned within it as the solver asks; its next state."""
    solver = prepared.state.solver
    if solver is None or schedule.response is None:
        return outcome.velocity, solver
    growth = prepared.growth if schedule.process is None else prepared.growth * schedule.process.scale
    return respond(solver, outcome.velocity, prepared.velocity, schedule.response, growth=growth, refresh=refresh)


@typed
def measure(prepared: Prepared, outcome: Outcome, refresh: Flags) -> Outcome:
    """The outcome with e where a sample refreshed and had a forecast, NaN elsewhere."""
    nothing = torch.full_like(outcome.measured_error, float("nan"))
    is_measured = refresh & (prepared.state.num_nodes > 0)
    return outcome._replace(measured_error=torch.where(is_measured, outcome.measured_error, nothing))


@typed
def advance(
    prepared: Prepared,
    outcome: Outcome,
    decision: Decision,
    schedule: StepSchedule,
    *,
    config: CacheConfig,
    groups: GroupState | None = None,
) -> CacheState:
    """The state after the step: refreshed samples start a new segment, the others extend theirs.

    Args:
        prepared: the branch before the decision.
        outcome: the branch after it; see `measure`.
        decision: that was taken.
        schedule: where the step stands.
        config: settings; static.
        groups: what groups of blocks remember after the step.

    """
    state, refresh = prepared.state, decision.refresh
    has_node = state.num_nodes > 0
    zeros = torch.zeros_like(decision.accumulated_error)
    signal = above_floor(outcome.measured_error, schedule.noise_floor)
    rate = torch.where(has_node, error_control.error_rate(signal, prepared.growth), torch.full_like(zeros, float("inf")))
    gap = torch.where(has_node, forecast.gap_to(state.nodes, schedule.sigma), zeros)
    lag = error_control.extend_lag(state.lag, prepared.growth, schedule.sigma, schedule.sigma_next)
    return CacheState(
        history=outcome.history if outcome.history.ndim == state.history.ndim else state.history,
        nodes=forecast.push(state.nodes, schedule.sigma.expand_as(zeros), refresh),
        steps=forecast.push(state.steps, schedule.step_index.expand_as(zeros), refresh),
        num_nodes=torch.where(refresh, (state.num_nodes + 1).clamp(max=config.num_nodes), state.num_nodes),
        error_rate=torch.where(refresh, rate, state.error_rate),
        error_order=torch.where(refresh, prepared.orders, state.error_order),
        accumulated_error=torch.where(refresh, zeros, decision.accumulated_error),
        last_gap=torch.where(refresh, gap, state.last_gap),
        lag=torch.where(refresh, zeros, lag),
        trail=state.trail,
        gate=remember(state.gate, prepared.observation, refresh, config=config),
        groups=groups,
        solver=state.solver,
        damping=torch.where(refresh, outcome.damping[0], state.damping) if state.damping is not None else None,
    )


@typed
def restart(state: CacheState, is_other: Flag | Flags) -> CacheState:
    """The state as at the start of a trajectory where the velocity, or the trajectory, has become another's; else as it was.

    What is known of the errors of one says nothing of another, and a jump between them is no error to catch up with.
    What is kept stays where it is: without nodes it counts for nothing, and whatever the policy, the next step is computed.

    Args:
        state: what the branch remembers.
        is_other: whether it is of another one; 0-d, or `[batch]`.

    """

    def cleared(value: Tensor, empty: float = 0.0) -> Tensor:
        return torch.where(is_other, torch.full_like(value, empty), value)

    groups, solver = state.groups, state.solver
    return state._replace(
        num_nodes=cleared(state.num_nodes),
        error_rate=cleared(state.error_rate, float("inf")),
        error_order=cleared(state.error_order),
        last_gap=cleared(state.last_gap),
        lag=cleared(state.lag),
        groups=None if groups is None else groups._replace(num_nodes=cleared(groups.num_nodes)),
        solver=None if solver is None else solver._replace(pending=cleared(solver.pending), settled=cleared(solver.settled)),
        damping=None if state.damping is None else cleared(state.damping, float("nan")),
    )
