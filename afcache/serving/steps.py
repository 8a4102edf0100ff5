"""One step of several requests, of which the host knows beforehand whether the model runs."""

from typing import Any

import torch

from afcache._typing import PerSample, Velocity, typed
from afcache.functional.guidance import lead
from afcache.functional.model import Model
from afcache.functional.state import CacheState, StepSchedule
from afcache.functional.step import move, take
from afcache.functional.update import Branch
from afcache.settings.config import CacheConfig


@typed
def served_step(
    model: Model,
    inputs: tuple[Any, ...],
    latents: Velocity,
    states: tuple[CacheState, ...],
    schedule: StepSchedule,
    guidance_scale: PerSample,
    *,
    config: CacheConfig,
    is_computed: bool,
) -> tuple[Velocity, tuple[CacheState, ...]]:
    """An Euler step that all samples compute, or that none does: `afcache.denoising_step` where that is known.

    Args:
        model: the transformer.
        inputs: of each guidance branch, the prompt's first.
        latents: x_i, `[batch, img_seq, channels]`.
        states: of each branch.
        schedule: where each sample stands; its fields are `[batch]`.
        guidance_scale: s per sample; unused without a second branch.
        config: settings; static.
        is_computed: what `afcache.functional.decision.foresee` told of this step; static.

    Returns:
        x_{i+1} in the dtype of `latents`; the next states; all tensors fresh.
    Cost:
        no host synchronisation; where nothing is computed, one row over every history.

    """
    placed = [model.architecture.place(each, latents, schedule.sigma) for each in inputs]
    branches = tuple(Branch(each, state) for each, state in zip(placed, states, strict=True))
    decided = torch.full_like(guidance_scale, is_computed, dtype=torch.bool)
    coupling = lead(states, schedule, guidance_scale, config=config)
    coupling = coupling._replace(is_follower=torch.ones_like(coupling.is_follower), leader_refresh=decided, known=is_computed)
    taken = take(model, branches, schedule, coupling, config=config)
    return move(latents, taken, schedule, guidance_scale), tuple(CacheState(*each.state) for each in taken)
