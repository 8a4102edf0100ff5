"""One step of several requests, of which the host knows beforehand whether the model runs."""

from typing import Any

import torch
from torch import Tensor

from afcache._typing import HostModule, PerSample, Velocity, typed
from afcache.functional.guidance import guide, lead
from afcache.functional.model import Architecture, AttentionKernel, model_of
from afcache.functional.shapes import per_sample
from afcache.functional.state import CacheState, StepSchedule
from afcache.functional.step import take
from afcache.functional.update import Branch
from afcache.settings.config import CacheConfig


@typed
def served_step(
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
    is_computed: bool,
) -> tuple[Velocity, tuple[CacheState, ...]]:
    """An Euler step that all samples compute, or that none does: `afcache.denoising_step` where that is known.

    Args:
        transformer: owner of the weights.
        inputs: of each guidance branch, the prompt's first.
        latents: x_i, `[batch, img_seq, channels]`.
        states: of each branch.
        schedule: where each sample stands; its fields are `[batch]`.
        guidance_scale: s per sample; unused without a second branch.
        architecture, kernel: of the model.
        config: settings; static.
        is_computed: what `afcache.functional.decision.foresee` told of this step; static.

    Returns:
        x_{i+1} in the dtype of `latents`; the next states; all tensors fresh.
    Cost:
        no host synchronisation; where nothing is computed, one row over every history.

    """
    model = model_of(transformer, architecture, kernel)
    placed = [architecture.place(each, latents, schedule.sigma) for each in inputs]
    branches = tuple(Branch(each, state) for each, state in zip(placed, states, strict=True))
    decided = torch.full_like(guidance_scale, is_computed, dtype=torch.bool)
    coupling = lead(states, schedule, guidance_scale, config=config)
    coupling = coupling._replace(is_follower=torch.ones_like(coupling.is_follower), leader_refresh=decided, known=is_computed)
    taken = take(model, branches, schedule, coupling, config=config)
    velocity: Tensor = guide(tuple(each.velocity for each in taken), guidance_scale)
    stepped = latents.to(torch.float32) + per_sample(schedule.sigma_next - schedule.sigma, velocity) * velocity
    return stepped.to(latents.dtype), tuple(CacheState(*each.state) for each in taken)
