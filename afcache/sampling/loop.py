"""A whole trajectory with the functional step: no pipeline, no scheduler object, no hidden state."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from afcache._typing import HostModule
from afcache.functional.initial import check_state, init_state
from afcache.functional.model import Architecture, AttentionKernel, scaled_dot_product_attention
from afcache.functional.plans import schedule_steps
from afcache.functional.state import CacheState, StepRecord
from afcache.functional.step import denoising_step
from afcache.models.flux1 import architecture as flux1
from afcache.models.flux1.checks import check_blocks, check_config, check_context, check_transformer
from afcache.settings.config import CacheConfig, resolve_config

Step = Callable[..., tuple[Tensor, tuple[CacheState, ...], tuple[StepRecord, ...]]]


class Denoised(NamedTuple):
    """A trajectory, finished or up to some step.

    Attributes:
        latents: at the noise level that was reached, `[batch, img_seq, channels]`.
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
    architecture: Architecture = flux1.FLUX,
    kernel: AttentionKernel | None = None,
    start: Denoised | None = None,
    stop: int | None = None,
) -> Denoised:
    """Integrate from the first noise level to the last, with a cache.

    import torch, afcache

    step = torch.compile(afcache.denoising_step, fullgraph=True)
    result = afcache.denoise(transformer, inputs, sigmas, step=step)

    Every step is one call of `step`, which is one graph when compiled; the state is threaded through as a value. So a
    trajectory can be left at any step, kept (`afcache.save_checkpoint`), and gone on with, more than once:

    half = afcache.denoise(transformer, inputs, sigmas, stop=14)
    result = afcache.denoise(transformer, inputs, sigmas, start=half)

    Args:
        transformer: owner of the weights, e.g. diffusers' FluxTransformer2DModel.
        inputs: `afcache.FluxInputs` at the first noise level: its hidden_states are the latents to start from.
        sigmas: noise levels, falling, one more than steps; used in float32.
        negative: inputs of the negative prompt, for classifier-free guidance; needs `guidance_scale`.
        guidance_scale: v = v_negative + guidance_scale (v_prompt - v_negative).
        config: settings; the preset "balanced" by default.
        step: `denoising_step`, or what torch.compile made of it; not in a mode with CUDA graphs, whose outputs the next call
            overwrites (`compile_pipeline` clones them). torch.compile counts recompiles per function, so more than eight
            configs, or combinations of batch, text length and guidance, in one process need
            `torch._dynamo.config.recompile_limit` raised; `compile_pipeline` counts for each pipeline.
        architecture: the model's parts.
        kernel: the attention kernel; by default that of the transformer's attention backend.
        start: a trajectory over the same sigmas to go on from, on the transformer's device; it is not changed. Its states
            must fit the config, whose tolerance and other numbers may be others.
        stop: how many steps are done at the end, those of `start` included; None means all.

    Returns:
        the latents, the last states, and a record of every step.

    Raises:
        TypeError: sigmas are no tensor, or the inputs are not FluxInputs.
        ValueError: more groups or blocks than the transformer has; sigmas are too few, not falling or above 1; a guidance
            scale that is not finite, or without negative inputs, or negative inputs with other latents; a start of other
            shapes, dtypes, branches, settings or sigmas, or a stop that is not after it.
        NotImplementedError: our forward would not compute what this transformer does; the message says why.

    """
    settings = resolve_config(config)
    if architecture is flux1.FLUX:
        check_transformer(transformer)
        check_blocks(transformer)
        check_config(transformer, settings)
        _check_inputs("inputs", inputs, transformer)
        check_context(inputs, settings)
        _check_inputs("negative", inputs if negative is None else negative, transformer)
    if kernel is None:
        kernel = flux1.attention_kernel(transformer) if architecture is flux1.FLUX else scaled_dot_product_attention
    _check(sigmas, inputs, negative, guidance_scale)
    branches = _detach((inputs,) if negative is None else (inputs, negative))
    batch, img_seq, _ = inputs.hidden_states.shape
    device = inputs.hidden_states.device
    sizes = [
        {
            "batch": batch,
            "img_seq": img_seq,
            "dim": transformer.inner_dim,
            "config": settings,
            "txt_seq": _text_length(branch),
            "num_blocks": 1 if architecture.parts is None else architecture.parts.num_blocks(transformer),
        }
        for branch in branches
    ]
    if start is None:
        states = tuple(init_state(**size, dtype=inputs.hidden_states.dtype, device=device) for size in sizes)
        start = Denoised(branches[0].hidden_states, states, [])
    else:
        _check_start(start, inputs.hidden_states, sigmas, sizes)
    latents, states, records = start.latents, start.states, list(start.records)
    scale = torch.full((batch,), guidance_scale, dtype=torch.float32, device=device)
    for schedule in schedule_steps(sigmas.to(device), settings)[_steps_left(start, stop, len(sigmas) - 1)]:
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


def _check_start(start: object, latents: Tensor, sigmas: Tensor, sizes: list[dict[str, Any]]) -> None:
    if not isinstance(start, Denoised):
        raise TypeError(f"start must be what denoise or load_checkpoint returned, got {type(start).__name__}.")
    if len(start.states) != len(sizes):
        raise ValueError(
            f"start must have a state for each guidance branch, {len(sizes)}, got {len(start.states)}. Pass the same negative."
        )
    if start.latents.shape != latents.shape or start.latents.device != latents.device:
        raise ValueError(
            f"start.latents must have shape {tuple(latents.shape)} on {latents.device}, as inputs.hidden_states have, got "
            f"{tuple(start.latents.shape)} on {start.latents.device}."
        )
    for state, size in zip(start.states, sizes, strict=True):
        check_state(state, **size)
        for name, tensor in (("latents", start.latents), ("states' history", state.history)):
            if (tensor.dtype, tensor.device) != (latents.dtype, latents.device):
                raise ValueError(
                    f"start's {name} must be {latents.dtype} on {latents.device}, as inputs.hidden_states are, got "
                    f"{tensor.dtype} on {tensor.device}. Go on in the dtype, and load_checkpoint on the device, of the model."
                )
        _check_levels(state, sigmas.float().cpu(), len(start.records))


def _check_levels(state: CacheState, sigmas: Tensor, done: int) -> None:
    """Raise unless what the state remembers was computed at these noise levels, before the step it goes on with."""
    filled = torch.arange(len(state.nodes))[:, None] < state.num_nodes.cpu()
    steps, nodes = state.steps.cpu()[filled].long(), state.nodes.cpu()[filled]
    if bool((steps >= min(done, len(sigmas))).any()):
        raise ValueError(
            f"start knows step {int(steps.max())}, but has {done} records, and there are {len(sigmas)} sigmas. Go on over the "
            "same sigmas, with the record of every step done."
        )
    if not torch.equal(sigmas[steps], nodes):
        raise ValueError(
            f"start was computed at other noise levels than sigmas: {nodes.tolist()} at steps {steps.tolist()}, which are "
            f"{sigmas[steps].tolist()} here. Go on over the same sigmas."
        )


def _steps_left(start: Denoised, stop: int | None, steps: int) -> slice:
    done, end = len(start.records), steps if stop is None else stop
    if isinstance(end, bool) or not isinstance(end, int) or not done < end <= steps:
        raise ValueError(
            f"stop must be a step after the {done} done and at most {steps}, got {stop!r}. A finished trajectory cannot go on."
        )
    return slice(done, end)


def _text_length(inputs: Any) -> int:
    return flux1.prefix_length(inputs) if isinstance(inputs, flux1.FluxInputs) else 0


def _detach(branches: tuple[Any, ...]) -> tuple[Any, ...]:
    """Text encoders called outside of no_grad return tensors that want a gradient; a trajectory has none.

    torch.cond takes no two tensors of the same memory: what the branches share stays one tensor, and views of one tensor
    (prompts that were encoded in one batch) become tensors of their own.
    """
    known: dict[int, Tensor] = {}
    storages: set[int] = set()

    def own(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            storage = tensor.untyped_storage().data_ptr()
            known[id(tensor)] = tensor.detach().clone() if storage in storages else tensor.detach()
            storages.add(storage)
        return known[id(tensor)]

    return pytree.tree_map_only(Tensor, own, branches)


def _check_inputs(name: str, value: Any, transformer: HostModule) -> None:
    if not isinstance(value, flux1.FluxInputs):
        raise TypeError(
            f"{name} must be afcache.FluxInputs, got {type(value).__name__}. Make them with afcache.FluxInputs(...)."
        )
    ranks = {"hidden_states": 3, "encoder_hidden_states": 3, "pooled_projections": 2, "img_ids": 2, "txt_ids": 2}
    for field, rank in ranks.items():
        shape = tuple(getattr(value, field).shape)
        if len(shape) != rank:
            raise ValueError(f"{name}.{field} must have {rank} axes, got shape {shape}; see afcache.FluxInputs.")
    batch = value.hidden_states.shape[0]
    for field in ("encoder_hidden_states", "pooled_projections"):
        if getattr(value, field).shape[0] != batch:
            raise ValueError(
                f"{name}.{field} must have as many samples as hidden_states, {batch}, got shape "
                f"{tuple(getattr(value, field).shape)}. Repeat the text for every image."
            )
    if value.hidden_states.dtype != transformer.dtype:
        raise ValueError(
            f"{name}.hidden_states must have the transformer's dtype {transformer.dtype}, got {value.hidden_states.dtype}. "
            "Convert them, or the transformer, with .to(dtype)."
        )
    latents, condition = value.hidden_states.shape[2], 0 if value.condition is None else value.condition.shape[2]
    if latents != transformer.out_channels or latents + condition != transformer.config.in_channels:
        others = transformer.config.in_channels - transformer.out_channels
        raise ValueError(
            f"{name}.hidden_states must have the latents' {transformer.out_channels} channels and {name}.condition "
            f"{f'the other {others}' if others else 'must be None'} for this transformer, got {latents} and {condition}. "
            "Control images and masks are the condition; reference images are the context."
        )
    if value.controlnet_block_samples or value.controlnet_single_block_samples:
        raise ValueError(
            f"{name}.controlnet_block_samples and controlnet_single_block_samples must be empty: a ControlNet's residuals are "
            "others at every step. Call afcache.denoising_step with those of each, or use a pipeline."
        )
    takes_guidance = bool(transformer.config.guidance_embeds)
    if (value.guidance is not None) != takes_guidance:
        expected = "a scale for each sample" if takes_guidance else "None"
        raise ValueError(f"{name}.guidance must be {expected} for this transformer, got {value.guidance!r}.")


def _is_same(x: Tensor, y: Tensor) -> bool:
    """Equal, NaN included: latents that are not finite are for the model to show, not for us to blame on the caller."""
    return x is y or (x.shape == y.shape and torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)))


def _check(sigmas: Tensor, inputs: Any, negative: Any, guidance_scale: float) -> None:
    cure = "Take scheduler.sigmas after scheduler.set_timesteps, or torch.linspace(1, 0, steps + 1)."
    if not isinstance(sigmas, Tensor):
        raise TypeError(f"sigmas must be a tensor of noise levels, got {type(sigmas).__name__}. {cure}")
    levels = sigmas.to(torch.float32)
    if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((levels[1:] < levels[:-1]).all()):
        raise ValueError(
            "sigmas must be a falling sequence of at least two noise levels, distinct in float32, got shape "
            f"{tuple(sigmas.shape)}: {sigmas}. {cure}"
        )
    if float(sigmas[0]) > 1 or float(sigmas[-1]) < 0:
        raise ValueError(
            f"sigmas must lie in [0, 1], got {float(sigmas[0]):g} to {float(sigmas[-1]):g}: timesteps are 1000 times as large. "
            f"{cure}"
        )
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be finite, got {guidance_scale!r}; 1 means no guidance.")
    if negative is None and guidance_scale != 1.0:
        raise ValueError(
            f"guidance_scale must be 1 without negative inputs, got {guidance_scale!r}. Pass negative=, or leave it out."
        )
    if negative is not None and not _is_same(negative.hidden_states, inputs.hidden_states):
        raise ValueError(
            f"negative.hidden_states {tuple(negative.hidden_states.shape)} must be inputs.hidden_states "
            f"{tuple(inputs.hidden_states.shape)}: both branches share the latents. Use inputs._replace(...)."
        )
