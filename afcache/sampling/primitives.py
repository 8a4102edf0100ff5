"""The pure functions as users call them, with a transformer and its architecture in place of a `Model`."""

from typing import Any

import torch

from afcache._typing import HostModule, PerSample, Velocity, typed
from afcache.functional.initial import StateShape, check_fit, check_values, empty_state
from afcache.functional.model import Architecture, AttentionKernel, model_of
from afcache.functional.state import CacheState, Coupling, StepRecord, StepSchedule
from afcache.functional.step import HistoryWriter, euler_step, take
from afcache.functional.update import Branch
from afcache.settings.config import CacheConfig


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
    """Compute or forecast the velocity of one step of one guidance branch.

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
            memory, and `state` must not be used again. Steps with groups do without.

    Returns:
        velocity `[batch, img_seq, channels]`; the next state, all tensors fresh; the record of the step.
    Cost:
        one host synchronisation where the state is on an accelerator; none where `coupling.known` holds the decision;
        one copy of `state.history` on either side of the decision; with a `writer`, on refreshes only.

    """
    model = model_of(transformer, architecture, kernel)
    (taken,) = take(model, (Branch(inputs, state),), schedule, coupling, config=config, writer=writer)
    return taken.velocity, taken.state, taken.record


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
        one decision, so one torch.cond, however many branches (steps with groups: two for each group and branch); one copy of
        every history.
    Reference:
        Ho, Salimans, 2022, arXiv 2207.12598 (guidance).

    """
    if not 1 <= len(inputs) <= 2:
        raise ValueError(f"inputs must have one entry for each guidance branch, one or two, got {len(inputs)}.")
    model = model_of(transformer, architecture, kernel)
    # Inputs are placed before they are held together: Dynamo would take the latents that they bring for an input of the graph.
    placed = [architecture.place(each, latents, schedule.sigma) for each in inputs]
    branches = tuple(Branch(each, state) for each, state in zip(placed, states, strict=True))
    stepped, taken = euler_step(model, branches, latents, schedule, guidance_scale, config=config)
    return stepped, tuple(each.state for each in taken), tuple(each.record for each in taken)


def init_state(
    batch: int,
    img_seq: int,
    dim: int,
    *,
    config: CacheConfig,
    txt_seq: int = 0,
    num_blocks: int = 1,
    channels: int = 0,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> CacheState:
    """Make the empty state of one guidance branch.

    Args:
        batch, img_seq, dim: shape of the image tokens inside the transformer; where its output is forecast, of the latents.
        config: settings.
        txt_seq: text tokens; asked for by groups, and by blocks that run at every step.
        num_blocks: of the transformer; asked for by groups.
        channels: of the latents' tokens, where residuals are forecast; without, nothing notices latents that are elsewhere.
        shards: ranks that share the tokens; the state holds one rank's.
        dtype: of residuals; statistics, and what is kept of outputs, are float32.
        device: where everything lives.
    Cost:
        config.num_nodes * batch * img_seq * dim elements of `dtype`; with groups, each holds as many, with text; the attention
        strategy holds one `[batch, seq, dim]` for every block.

    """
    shape = StateShape(batch, img_seq, dim, txt_seq, num_blocks, shards, channels=channels)
    return empty_state(shape, config=config, dtype=dtype, device=device)


def check_state(
    state: CacheState,
    *,
    batch: int,
    img_seq: int,
    dim: int,
    config: CacheConfig,
    txt_seq: int = 0,
    num_blocks: int = 1,
    channels: int = 0,
) -> None:
    """Raise unless every field has the shape and dtype that the step expects, and values to go on with.

    Args:
        state: to be checked.
        batch, img_seq, dim, config, txt_seq, num_blocks, channels: as of `init_state`.

    Raises:
        TypeError: a field is not a tensor, or a part that the settings ask for is missing.
        ValueError: a field has the wrong shape or dtype, or an impossible value; the message names it.

    """
    check_fit(state, StateShape(batch, img_seq, dim, txt_seq, num_blocks, channels=channels), config=config)
    check_values(state, config=config)
