"""The cached forward of one or more guidance branches, and the denoising step around it, as pure functions of the state."""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from afcache._typing import Flags, PerSample, Velocity, typed
from afcache.functional import error_control, forecast
from afcache.functional.branch import branch
from afcache.functional.decision import Decision, compute_without_history, decide, forecast_row, growth, predict_error
from afcache.functional.distance import relative_l2
from afcache.functional.gates import gate, sections
from afcache.functional.groups.step import take_groups
from afcache.functional.guidance import follow, guide, lead
from afcache.functional.model import Model
from afcache.functional.ranks.agreement import agree
from afcache.functional.state import CacheState, Coupling, StepRecord, StepSchedule
from afcache.functional.update import Branch, Outcome, Prepared, Taken, advance, correct, measure, written_in_place
from afcache.settings.config import CacheConfig

# Writes (history, newest residual, refresh flags) into the history's own memory.
HistoryWriter = Callable[[Tensor, Tensor, Tensor], None]


@typed
def full_forward(model: Model, inputs: Any) -> Tensor:
    """Compute the velocity without any cache: embed, all blocks, head; `[batch, img_seq, channels]`."""
    embedded = model.architecture.embed(model.transformer, inputs)
    return model.architecture.head(model.transformer, model.architecture.stack(model, inputs, embedded), embedded.temb)


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
    velocity = guide(tuple(each.velocity for each in taken), guidance_scale)
    stepped = latents.to(torch.float32) + (schedule.sigma_next - schedule.sigma) * velocity
    return stepped.to(latents.dtype), taken


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

    The forecast v_hat is always made (its cost is one row over the history and the head). If any sample must refresh, the
    blocks run: its residual enters the history, e is measured against v_hat, and what earlier forecasts left out is
    returned within the velocity. All other samples keep v_hat.

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
    if config.layerwise is not None:
        return _take_one_by_one(model, branches, schedule, coupling, config=config)
    prepared = tuple(prepare(model, each, schedule, config=config) for each in branches)
    first, *others = prepared
    decision = decide(first.state, schedule, coupling, first.observation, config=config, exchange=model.exchange)
    decision = agree(compute_without_history(decision, [other.state for other in others]), model.exchange)
    is_refreshed = decision.refresh.any()
    outcomes = branch(
        is_refreshed if coupling.known is None else coupling.known,
        lambda: tuple(_compute(model, each, decision.refresh, schedule, config=config, writer=writer) for each in prepared),
        lambda: tuple(_reuse(each, is_pure=writer is None) for each in prepared),
    )
    decisions = [decision, *(_carry_out(decision, other.state, schedule, config=config) for other in others)]
    taken = []
    for each, outcome, its in zip(prepared, outcomes, decisions, strict=True):
        outcome = measure(each, outcome, its.refresh)
        state = advance(each, outcome, its, schedule, config=config)
        record = StepRecord(
            refresh=its.refresh.clone(),
            is_computed=is_refreshed.clone() if coupling.known is None else coupling.known,
            predicted_error=its.predicted_error,
            measured_error=outcome.measured_error,
            accumulated_error=state.accumulated_error.clone(),
            votes=its.votes,
        )
        taken.append(Taken(outcome.velocity, state, record))
    return tuple(taken)


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
    """What every step does before it decides: embed, run the first blocks, forecast, and apply last blocks and head.

    Args:
        model: the transformer.
        before: the branch.
        schedule: where the step stands.
        config: settings; static.

    """
    inputs, state = before
    embedded = model.architecture.embed(model.transformer, inputs)
    start = sections.run_first_blocks(model, inputs, embedded, config=config)
    residual_hat = forecast.apply_row(forecast_row(state, schedule, config=config), state.history)
    hidden_states = sections.run_last_blocks(model, inputs, embedded, start + residual_hat, config=config)
    orders = forecast.row_order(state.num_nodes, order=config.order)
    return Prepared(
        inputs=inputs,
        state=state,
        embedded=embedded,
        start=start,
        velocity=model.architecture.head(model.transformer, hidden_states, embedded.temb),
        orders=orders,
        growth=growth(state.nodes, orders, schedule.sigma, config=config),
        observation=gate.observe(model, state.gate, embedded, start, config=config),
    )


def _compute(
    model: Model,
    prepared: Prepared,
    refresh: Flags,
    schedule: StepSchedule,
    *,
    config: CacheConfig,
    writer: HistoryWriter | None,
) -> Outcome:
    """Run the blocks; samples that do not refresh keep their forecast and their history."""
    inputs, embedded, history = prepared.inputs, prepared.embedded, prepared.state.history
    tokens = sections.run_cached_blocks(model, inputs, embedded, prepared.start, config=config)
    hidden_states = sections.run_last_blocks(model, inputs, embedded, tokens, config=config)
    velocity = model.architecture.head(model.transformer, hidden_states, embedded.temb)
    measured = relative_l2(prepared.velocity, velocity, reduction=model.exchange.over_tokens)
    if config.correction:
        velocity = correct(velocity, prepared, schedule)
    velocity = torch.where(rearrange(refresh, "batch -> batch 1 1"), velocity, prepared.velocity)
    residual = tokens - prepared.start
    if writer is None:
        return Outcome(velocity, measured, forecast.push(history, residual, refresh))
    writer(history, residual, refresh)
    return Outcome(velocity, measured, written_in_place(history))


def _reuse(prepared: Prepared, *, is_pure: bool) -> Outcome:
    history = prepared.state.history
    unmeasured = torch.full_like(prepared.growth, float("nan"))
    return Outcome(prepared.velocity.clone(), unmeasured, history.clone() if is_pure else written_in_place(history))


def _carry_out(decision: Decision, state: CacheState, schedule: StepSchedule, *, config: CacheConfig) -> Decision:
    """The first branch's decision as another branch of the call carries it out, with estimates of its own."""
    error = predict_error(state, schedule, config=config)
    added = error_control.contribution(error, schedule.sigma, schedule.sigma_next)
    return Decision(decision.refresh, error, state.accumulated_error + added)
