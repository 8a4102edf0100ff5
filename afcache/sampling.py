"""A whole trajectory with the functional step: no pipeline, no scheduler object, no hidden state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from afcache._typing import HostModule
from afcache.config import CacheConfig, resolve_config
from afcache.functional.attention import AttentionKernel, scaled_dot_product_attention
from afcache.functional.step import Architecture, denoising_step
from afcache.models import flux
from afcache.state import CacheState, StepRecord, init_state, schedule_steps

Step = Callable[..., tuple[Tensor, tuple[CacheState, ...], tuple[StepRecord, ...]]]


class Denoised(NamedTuple):
    """A finished trajectory.

    Attributes:
        latents: at the last noise level, `[batch, img_seq, channels]`.
        states: one for each guidance branch.
        records: for each step, one record for each guidance branch.

    """

    latents: Tensor
    states: tuple[CacheState, ...]
    records: list[tuple[StepRecord, ...]]

    def pattern(self, sample: int = 0) -> str:
        """One letter per step: F computed, "." forecast."""
        return "".join("F" if bool(leader.refresh[sample]) else "." for leader, *_ in self.records)


@torch.no_grad()
def denoise(
    transformer: HostModule,
    inputs: Any,
    sigmas: Tensor,
    *,
    negative: Any = None,
    guidance_scale: float = 1.0,
    config: CacheConfig | None = None,
    step: Step = denoising_step,
    architecture: Architecture = flux.FLUX,
    kernel: AttentionKernel = scaled_dot_product_attention,
) -> Denoised:
    """Integrate from the first noise level to the last, with a cache.

    import torch, afcache

    step = torch.compile(afcache.denoising_step, fullgraph=True)
    result = afcache.denoise(transformer, inputs, sigmas, step=step)

    Every step is one call of `step`, which is one graph when compiled; the state is threaded through as a value.

    Args:
        transformer: owner of the weights, e.g. diffusers' FluxTransformer2DModel.
        inputs: `afcache.FluxInputs` at the first noise level: its hidden_states are the latents to start from.
        sigmas: noise levels, falling, one more than steps; used in float32.
        negative: inputs of the negative prompt, for classifier-free guidance; needs `guidance_scale`.
        guidance_scale: v = v_negative + guidance_scale (v_prompt - v_negative).
        config: settings; the preset "balanced" by default.
        step: `denoising_step`, or what torch.compile made of it.
        architecture: the model's parts.
        kernel: the attention kernel.

    Returns:
        the latents, the last states, and a record of every step.

    Raises:
        ValueError: sigmas are too few, not distinct or not falling; a guidance scale without negative inputs, or negative
            inputs of another shape; policy "none", which has no state.

    """
    settings = resolve_config(config)
    _check(sigmas, inputs, negative, guidance_scale, settings)
    branches = _detach((inputs,) if negative is None else (inputs, negative))
    latents = branches[0].hidden_states
    batch, img_seq, _ = latents.shape
    states = tuple(
        init_state(batch, img_seq, transformer.inner_dim, order=settings.order, dtype=latents.dtype, device=latents.device)
        for _ in branches
    )
    scale = torch.full((batch,), guidance_scale, dtype=torch.float32, device=latents.device)
    records = []
    for schedule in schedule_steps(sigmas.to(latents.device), tolerance=settings.tolerance):
        latents, states, record = step(
            transformer,
            branches,
            latents,
            states,
            schedule,
            scale,
            architecture=architecture,
            kernel=kernel,
            config=settings,
        )
        records.append(record)
    return Denoised(latents, states, records)


def _detach(branches: tuple[Any, ...]) -> tuple[Any, ...]:
    """Text encoders called outside of no_grad return tensors that want a gradient; a trajectory has none.

    What the branches share stays one tensor: torch.cond takes no two tensors of the same memory.
    """
    known: dict[int, Tensor] = {}
    return pytree.tree_map_only(Tensor, lambda tensor: known.setdefault(id(tensor), tensor.detach()), branches)


def _check(sigmas: Tensor, inputs: Any, negative: Any, guidance_scale: float, config: CacheConfig) -> None:
    if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise ValueError(
            f"sigmas must be a falling sequence of at least two noise levels, got shape {tuple(sigmas.shape)}: {sigmas}. "
            "Take scheduler.sigmas after scheduler.set_timesteps, or torch.linspace(1, 0, steps + 1)."
        )
    if config.policy == "none":
        raise ValueError(
            'config.policy must be "adaptive" or "fixed", got "none", which threads no state. Use '
            "CacheConfig(tolerance=0.0) to compute every step."
        )
    if negative is None and guidance_scale != 1.0:
        raise ValueError(
            f"guidance_scale must be 1 without negative inputs, got {guidance_scale!r}. Pass negative=, or leave it out."
        )
    if negative is not None and negative.hidden_states.shape != inputs.hidden_states.shape:
        raise ValueError(
            f"negative.hidden_states must have the shape of inputs.hidden_states {tuple(inputs.hidden_states.shape)}, got "
            f"{tuple(negative.hidden_states.shape)}. Both branches share the latents: pass the same tensor."
        )
