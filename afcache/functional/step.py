"""The cached forward of one or more guidance branches, and the denoising step around it, as pure functions of the state."""

from collections.abc import Callable

import torch
from torch import Tensor

from afcache._typing import Flag, Flags, PerSample, Velocity, typed
from afcache.functional import error_control, forecast
from afcache.functional.branch import branch
from afcache.functional.continuity import leave_trail, stay, strays
from afcache.functional.decision import Decision, compute_without_history, decide, predict_error
from afcache.functional.features import compute_features, prepare_features
from afcache.functional.groups.step import take_groups
from afcache.functional.guidance import follow, guide, lead, measure_errors
from afcache.functional.model import Model
from afcache.functional.outputs import compute_outputs, prepare_output
from afcache.functional.ranks.agreement import agree
from afcache.functional.shapes import per_sample
from afcache.functional.state import CacheState, Coupling, Lead, StepRecord, StepSchedule
from afcache.functional.update import (
    Branch,
    Computed,
    Outcome,
    Prepared,
    Taken,
    advance,
    answer,
    correct,
    measure,
    written_in_place,
)
from afcache.settings.config import CacheConfig

# Writes (history, what is kept of the newest computation, refresh flags) into the history's own memory.
HistoryWriter = Callable[[Tensor, Tensor, Tensor], None]


@typed
def euler_step(
    model: Model,
    branches: tuple[Branch, ...],
    latents: Velocity,
    schedule: StepSchedule,
    guidance_scale: PerSample,
    *,
    config: CacheConfig,
) -> tuple[Velocity, tuple[Taken, ...]]:
    """Take one Euler step of the trajectory, with one decision for all guidance branches.

    x_{i+1} = x_i + (sigma_{i+1} - sigma_i) (v_2 + s (v_1 - v_2));  v_1 alone where there is one branch

    Args:
        model: the transformer.
        branches: the prompt's first, placed at `latents` and the schedule's sigma.
        latents: x_i.
        schedule: where the step stands.
        guidance_scale: s per sample; unused without a second branch.
        config: settings; static.

    Returns:
        x_{i+1} in the dtype of `latents`; the branches after the step.

    """
    coupling = lead(tuple(each.state for each in branches), schedule, guidance_scale, config=config)
    taken = take(model, branches, schedule, coupling, config=config)
    return move(latents, taken, schedule, guidance_scale), taken


@typed
def move(latents: Velocity, taken: tuple[Taken, ...], schedule: StepSchedule, guidance_scale: PerSample) -> Velocity:
    """x_{i+1} by Euler's step along the guided velocity, in the dtype of the latents.

    Args:
        latents: x_i.
        taken: the branches after the step.
        schedule: where the step stands.
        guidance_scale: s per sample; unused without a second branch.

    """
    velocity = guide(tuple(each.velocity for each in taken), guidance_scale)
    stepped = latents.to(torch.float32) + per_sample(schedule.sigma_next - schedule.sigma, velocity) * velocity
    return stepped.to(latents.dtype)


@typed
def take(
    model: Model,
    branches: tuple[Branch, ...],
    schedule: StepSchedule,
    coupling: Coupling,
    *,
    config: CacheConfig,
    writer: HistoryWriter | None = None,
) -> tuple[Taken, ...]:
    """Compute or forecast the velocity of every branch at one step, under one decision: the first branch's.

    The forecast v_hat is always made (its cost is one row over the history, and the head where a residual is forecast). If any
    sample must refresh, the model runs: what the target keeps of it enters the history, e is measured against v_hat, and what
    earlier forecasts left out is returned within the velocity. All other samples keep v_hat. A sample that is not where its
    last step led begins anew (`afcache.functional.continuity`).

    Args:
        model: the transformer.
        branches: those of this call; others share the decision through `coupling`.
        schedule: where the step stands.
        coupling: of the first branch.
        config: settings; static.
        writer: None keeps the function pure. Otherwise it updates `state.history` in place, the next state shares that
            memory, and the state must not be used again. Steps with groups do without.

    Returns:
        the branches after the step.
    Cost:
        one host synchronisation where the state is on an accelerator, however many branches; none where `coupling.known`
        holds the decision; one copy of every history on either side of the decision; with a `writer`, on refreshes only. With
        groups: two synchronisations for each group and branch.

    """
    latents = model.architecture.latents(branches[0].inputs)
    restarted = strays(latents, tuple(each.state for each in branches), schedule, coupling)
    branches = tuple(stay(each, restarted) for each in branches)
    if config.layerwise is not None:
        taken = _take_one_by_one(model, branches, schedule, coupling, config=config)
    else:
        taken = _take_at_once(model, branches, schedule, coupling, config=config, writer=writer)
    return tuple(leave_trail(each, latents, restarted, schedule) for each in taken)


def _take_at_once(
    model: Model,
    branches: tuple[Branch, ...],
    schedule: StepSchedule,
    coupling: Coupling,
    *,
    config: CacheConfig,
    writer: HistoryWriter | None,
) -> tuple[Taken, ...]:
    """One decision before the step, and one branch on it for everything."""
    prepared = tuple(prepare(model, each, schedule, config=config) for each in branches)
    first, *others = prepared
    decision = decide(first.state, schedule, coupling, first.observation, config=config, exchange=model.exchange)
    decision = agree(compute_without_history(decision, [other.state for other in others]), model.exchange)
    is_refreshed = decision.refresh.any()
    is_led = coupling.lead is not None

    def compute() -> tuple[Outcome, ...]:
        computed = _compute(model, prepared, schedule, config=config)
        outcomes = []
        for each, its in zip(
            prepared, measure_errors(model, prepared, computed, schedule, coupling, config=config), strict=True
        ):
            outcome = _keep(each, its, decision.refresh, schedule, config=config, writer=writer)
            # In the forecast's dtype: under autocast the model's may be another, and both sides of a branch are alike.
            outcomes.append(outcome._replace(computed=(its.velocity.to(each.velocity.dtype),)) if is_led else outcome)
        return tuple(outcomes)

    outcomes = branch(
        is_refreshed if coupling.known is None else coupling.known,
        compute,
        lambda: tuple(_reuse(each, is_pure=writer is None, is_led=is_led) for each in prepared),
    )
    decisions = [decision, *(_carry_out(decision, other.state, schedule, config=config) for other in others)]
    taken = []
    for each, outcome, its in zip(prepared, outcomes, decisions, strict=True):
        outcome = measure(each, outcome, its.refresh)
        velocity, solver = answer(each, outcome, its.refresh, schedule)
        state = advance(each, outcome, its, schedule, config=config)._replace(solver=solver)
        record = StepRecord(
            refresh=its.refresh.clone(),
            is_computed=_is_computed(is_refreshed, coupling),
            predicted_error=its.predicted_error,
            measured_error=outcome.measured_error,
            accumulated_error=state.accumulated_error.clone(),
            votes=its.votes,
        )
        lead = Lead(outcome.computed[0], each.velocity) if outcome.computed else None
        taken.append(Taken(velocity, state, record, lead))
    return tuple(taken)


def _is_computed(is_refreshed: Flag, coupling: Coupling) -> Flag:
    if coupling.known is None:
        return is_refreshed.clone()
    return torch.full_like(is_refreshed, coupling.known) if isinstance(coupling.known, bool) else coupling.known


def _take_one_by_one(
    model: Model, branches: tuple[Branch, ...], schedule: StepSchedule, coupling: Coupling, *, config: CacheConfig
) -> tuple[Taken, ...]:
    """Groups decide within the step: one branch after the other, and those after the first do what it did."""
    taken: list[Taken] = []
    for each in branches:
        coupling = follow(coupling, taken[0].record) if taken else coupling
        taken.append(take_groups(model, each, schedule, coupling, config=config))
    return tuple(taken)


@typed
def prepare(model: Model, before: Branch, schedule: StepSchedule, *, config: CacheConfig) -> Prepared:
    """What every step does before it decides.

    Args:
        model: the transformer.
        before: the branch.
        schedule: where the step stands.
        config: settings; static.

    """
    prepare_branch = prepare_output if config.forecasts_output else prepare_features
    return prepare_branch(model, before, schedule, config=config)


def _compute(
    model: Model, prepared: tuple[Prepared, ...], schedule: StepSchedule, *, config: CacheConfig
) -> tuple[Computed, ...]:
    """Run the model, or its blocks, for every branch."""
    if config.forecasts_output:
        return compute_outputs(model, prepared, schedule, config=config)
    return tuple(compute_features(model, each, config=config) for each in prepared)


def _keep(
    prepared: Prepared,
    computed: Computed,
    refresh: Flags,
    schedule: StepSchedule,
    *,
    config: CacheConfig,
    writer: HistoryWriter | None,
) -> Outcome:
    """What the samples that refresh take from a computation; the others keep their forecast and their history."""
    assert computed.error is not None
    velocity, history = computed.velocity, prepared.state.history
    if config.correction:
        velocity = correct(velocity, prepared, schedule)
    velocity = torch.where(per_sample(refresh, velocity), velocity, prepared.velocity)
    damping = () if computed.damping is None else (computed.damping,)
    if writer is None:
        return Outcome(velocity, computed.error, forecast.push(history, computed.kept, refresh), damping=damping)
    writer(history, computed.kept, refresh)
    return Outcome(velocity, computed.error, written_in_place(history), damping=damping)


def _reuse(prepared: Prepared, *, is_pure: bool, is_led: bool) -> Outcome:
    history = prepared.state.history
    return Outcome(
        velocity=prepared.velocity.clone(),
        measured_error=torch.full_like(prepared.growth, float("nan")),
        history=history.clone() if is_pure else written_in_place(history),
        computed=(prepared.velocity.clone(),) if is_led else (),
        damping=() if prepared.state.damping is None else (prepared.state.damping.clone(),),
    )


def _carry_out(decision: Decision, state: CacheState, schedule: StepSchedule, *, config: CacheConfig) -> Decision:
    """The first branch's decision as another branch of the call carries it out, with estimates of its own."""
    error = predict_error(state, schedule, config=config)
    added = error_control.contribution(
        error, schedule.sigma, schedule.sigma_next, weight=config.error_weight, early_weight=config.early_weight
    )
    return Decision(decision.refresh, error, state.accumulated_error + added)
