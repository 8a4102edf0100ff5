"""A whole trajectory with the functional step: no pipeline, no scheduler object, no hidden state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from afcache._typing import HostModule, PerSample
from afcache.functional.initial import StateShape, empty_state, shape_of
from afcache.functional.model import Architecture, AttentionKernel, Model, model_of, scaled_dot_product_attention
from afcache.functional.plans import schedule_steps
from afcache.functional.state import CacheState, StepRecord, StepSchedule
from afcache.models.families import family_of, family_with
from afcache.sampling.checks import check_arguments, check_start, steps_left
from afcache.sampling.origin import origin_of
from afcache.sampling.primitives import denoising_step
from afcache.sampling.result import Denoised
from afcache.settings.config import CacheConfig
from afcache.settings.presets import resolve_config

Step = Callable[..., tuple[Tensor, tuple[CacheState, ...], tuple[StepRecord, ...]]]


class Journey(NamedTuple):
    """A trajectory before its first step.

    Attributes:
        model: the transformer.
        config: settings.
        branches: inputs of each guidance branch, the prompt's first.
        schedule: its steps.
        guidance_scale: per sample.
        start: latents and states.

    """

    model: Model
    config: CacheConfig
    branches: tuple[Any, ...]
    schedule: list[StepSchedule]
    guidance_scale: PerSample
    start: Denoised


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
    architecture: Architecture | None = None,
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
        transformer: owner of the weights: diffusers' own.
        inputs: what the architecture takes, at the first noise level: its hidden_states are the latents to start from.
        sigmas: noise levels, falling, one more than steps; used in float32.
        negative: inputs of the negative prompt, for classifier-free guidance; needs `guidance_scale`.
        guidance_scale: v = v_negative + guidance_scale (v_prompt - v_negative).
        config: settings; the preset "balanced" by default.
        step: `denoising_step`, or what torch.compile made of it; not in a mode with CUDA graphs, whose outputs the next call
            overwrites (`compile_pipeline` clones them). torch.compile counts recompiles per function, so more than eight
            configs, or combinations of batch, text length and guidance, in one process need
            `torch._dynamo.config.recompile_limit` raised; `compile_pipeline` counts for each pipeline.
        architecture: the model's parts; by default those of the transformer's family.
        kernel: the attention kernel; by default that of the transformer's attention backend.
        start: a trajectory to go on from, on the transformer's device; it is not changed. It must be of the same transformer,
            inputs (but for the latents, which are its own), sigmas and guidance scale, and of the same settings, but for
            tolerance, max_growth and damping; one whose origin is None is taken at its word, if its states fit.
        stop: how many steps are done at the end, those of `start` included; None means all.

    Returns:
        the latents, the last states, and a record of every step.

    Raises:
        TypeError: sigmas are no tensor, or the inputs are none of the family's.
        ValueError: more groups or blocks than the transformer has; sigmas are too few, not falling or above 1; a guidance
            scale that is not finite, or without negative inputs, or negative inputs with other latents; a start of another
            model, other inputs, shapes, dtypes, branches, settings, sigmas or guidance, or a stop that is not after it.
        NotImplementedError: our forward would not compute what this transformer does; the message says why.

    """
    parts = architecture, kernel
    journey = prepare(transformer, (inputs, negative), sigmas, guidance_scale=guidance_scale, config=config, parts=parts)
    model, settings = journey.model, journey.config
    if start is not None:
        shapes = [branch_shape(model, branch, settings) for branch in journey.branches]
        check_start(start, journey.start, sigmas, shapes, settings)
    latents, states, records, target, origin = start or journey.start
    records = list(records)
    for schedule in journey.schedule[steps_left(start or journey.start, stop, len(sigmas) - 1)]:
        latents, states, record = step(
            transformer,
            journey.branches,
            latents,
            states,
            schedule,
            journey.guidance_scale,
            architecture=model.architecture,
            kernel=model.kernel,
            config=settings,
        )
        records.append(record)
    # The settings may be others from here on; whose origin nobody knows stays so.
    return Denoised(latents, states, records, target, None if origin is None else journey.start.origin)


def prepare(
    transformer: HostModule,
    given: tuple[Any, Any],
    sigmas: Tensor,
    *,
    guidance_scale: float,
    config: CacheConfig | None,
    parts: tuple[Architecture | None, AttentionKernel | None] = (None, None),
    is_kept: bool = True,
) -> Journey:
    """The trajectory that `denoise` walks with these arguments, before its first step.

    Args:
        transformer: owner of the weights.
        given: inputs, and those of the negative prompt or None.
        sigmas: noise levels, one more than steps.
        guidance_scale: of all samples.
        config: settings; None takes the preset "balanced".
        parts: architecture and kernel; None takes the family's.
        is_kept: whether it may be kept in a file; else it does not know its origin, which takes milliseconds to find.

    Raises:
        TypeError, ValueError, NotImplementedError: what `denoise` raises of them.

    """
    settings = resolve_config(config)
    model = _model(transformer, given, settings, *parts)
    check_arguments(sigmas, *given, guidance_scale)
    branches = _detach(tuple(each for each in given if each is not None))
    latents = branches[0].hidden_states
    states = tuple(
        empty_state(branch_shape(model, branch, settings), config=settings, dtype=latents.dtype, device=latents.device)
        for branch in branches
    )
    scale = torch.full((latents.shape[0],), guidance_scale, dtype=torch.float32, device=latents.device)
    schedule = schedule_steps(sigmas.to(latents.device), settings)
    origin = origin_of(model, branches, sigmas, guidance_scale=guidance_scale, config=settings) if is_kept else None
    return Journey(model, settings, branches, schedule, scale, Denoised(latents, states, [], settings.target, origin))


def _model(
    transformer: HostModule,
    inputs: tuple[Any, Any],
    config: CacheConfig,
    architecture: Architecture | None,
    kernel: AttentionKernel | None,
) -> Model:
    """The transformer, checked as its family asks where the architecture is that of one."""
    family = family_of(transformer) if architecture is None else family_with(architecture)
    if family is None:
        assert architecture is not None
        return model_of(transformer, architecture, kernel or scaled_dot_product_attention)
    family.checks.transformer(transformer)
    family.checks.blocks(transformer)
    family.checks.config(transformer, config)
    given, negative = inputs
    family.checks.inputs("inputs", given, transformer, config)
    if negative is not None:
        family.checks.inputs("negative", negative, transformer, config)
    return model_of(transformer, family.architecture, kernel or family.attention_kernel(transformer))


def branch_shape(model: Model, inputs: Any, config: CacheConfig) -> StateShape:
    """What the state of a guidance branch with these inputs is made for."""
    parts = model.architecture.parts
    prefix_length = 0 if parts is None else parts.prefix_length(inputs)
    return shape_of(model.sizes, model.architecture.latents(inputs).shape, prefix_length, config=config)


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
