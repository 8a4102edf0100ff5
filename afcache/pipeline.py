"""compile_pipeline and restore_pipeline: binding our forward to a diffusers pipeline. The only torch.compile is here."""

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers import (
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor

from afcache.models.flux1 import architecture as flux1
from afcache.models.flux1.checks import check_blocks, check_config, check_transformer
from afcache.parallel.groups import ParallelConfig, ParallelContext, check_device, check_heads, connect
from afcache.runtime.compiled import CompileOptions
from afcache.runtime.controls import unwatch
from afcache.runtime.runtime import Runtime
from afcache.runtime.scheduler import check_scheduler
from afcache.runtime.weights import check_layers
from afcache.settings.config import CacheConfig, resolve_config

_ATTRIBUTE = "_afcache"
_ORIGINAL = "_afcache_original_forward"
_MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_PIPELINES = (
    FluxPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxFillPipeline,
    FluxControlPipeline,
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    FluxControlNetPipeline,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxKontextPipeline,
    FluxKontextInpaintPipeline,
)
PipelineT = TypeVar("PipelineT")


def compile_pipeline(
    pipe: PipelineT,
    config: CacheConfig | None = None,
    *,
    tolerance: float | None = None,
    preset: str | None = None,
    compile: bool = True,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
    parallel: ParallelConfig | None = None,
    decide_ahead: bool = False,
) -> PipelineT:
    """Make a FLUX pipeline sample faster, in place.

    Our forward is bound to the transformer instance; no class is changed, and saving, LoRA, offload, `from_pipe` and
    `deepcopy` work as before. Calling it again replaces the settings. Every pipeline that shares the transformer is cached,
    whatever its class; one that has a scheduler of its own must be passed here as well. Not for two threads at once.

    Args:
        pipe: any of diffusers' FLUX.1 pipelines that has a transformer.
        config: complete settings; excludes `tolerance` and `preset`.
        tolerance: error budget between refreshes; 0 computes every step.
        preset: "quality", "balanced" (default) or "fast".
        compile: compile the forward as one graph; False runs it eagerly.
        backend: torch.compile's backend.
        mode: torch.compile's mode.
        dynamic: torch.compile's dynamic shapes; None lets a second shape make them dynamic, False compiles each shape by
            itself and updates the history in place; so does None where ranks share a sequence.
        parallel: how to share the work among the processes that torchrun started; on all of them the pipeline is called with
            the same arguments and returns the same images. Every process holds all weights.
        decide_ahead: wait for the device once a refresh, which decides all steps up to the next one, instead of at every step.
            Images are the same. Not together with `parallel`, gates ("teacache", "dbcache") or groups.

    Returns:
        the same pipeline.

    Raises:
        NotImplementedError: the pipeline, its transformer or its scheduler is not supported; the message says what is.
        ValueError: conflicting or invalid settings, or more groups or blocks than the transformer has.
        RuntimeError: `parallel` does not fit the processes that run, or xfuser cannot be imported.
    Cost:
        Memory: order + 1 residuals of the image tokens per guidance branch (24 MiB each for FLUX.1 at 1024 x 1024 in
        bfloat16); as many for each group of a `Layerwise` config, and its "attention" strategy keeps one per block. The first
        image also pays for compilation.

    """
    if parallel is not None and not isinstance(parallel, ParallelConfig):
        raise TypeError(f"parallel must be an afcache.ParallelConfig or None, got {parallel!r}.")
    settings = resolve_config(config, tolerance=tolerance, preset=preset)
    transformer = _transformer(pipe)
    check_transformer(transformer)
    check_blocks(transformer)
    check_config(transformer, settings)
    check_scheduler(pipe.scheduler, forecasts=settings.policy != "none")  # pyright: ignore[reportAttributeAccessIssue]
    # Shares of a sequence have sizes that torch.cond cannot take as symbols (torch 2.13).
    if dynamic is None and parallel is not None and parallel.shares_sequence:
        dynamic = False
    _check_foresight(decide_ahead, settings, parallel)
    options = CompileOptions(enabled=compile, backend=backend, mode=mode, dynamic=dynamic)
    _check_options(options)
    if compile:
        check_layers(transformer)
    context = None if parallel is None else _connect(parallel, transformer)
    runtime = Runtime(transformer, settings, options, torch.compile, context, decides_ahead=decide_ahead)
    previous = bound_runtime(transformer)
    for served in [*(previous.pipes() if previous is not None else []), pipe]:
        runtime.serve(served)
    if previous is None:
        _check_forward(transformer)
        _bind(transformer)
    setattr(transformer, _ATTRIBUTE, runtime)
    return pipe


def restore_pipeline(pipe: PipelineT) -> PipelineT:
    """Undo `compile_pipeline`: the transformer runs its own forward again, for every pipeline that shares it.

    Raises:
        ValueError: the pipeline was not compiled by `compile_pipeline`.

    """
    runtime = require_runtime(pipe)
    unwatch(runtime.pipes())
    transformer = _transformer(pipe)
    for name in ("forward", "_old_forward"):
        if _is_ours(transformer.__dict__.get(name)):
            _put_back(transformer, name)
    delattr(transformer, _ATTRIBUTE)
    transformer.__dict__.pop(_ORIGINAL, None)
    return pipe


@contextlib.contextmanager
def uncached(pipe: Any) -> Iterator[None]:
    """Run the transformer's own forward inside the block; the compiled one, its settings and its report stay.

    Raises:
        ValueError: the pipeline was not compiled by `compile_pipeline`.

    """
    runtime = require_runtime(pipe)
    before, runtime.is_bypassed = runtime.is_bypassed, True
    try:
        yield
    finally:
        runtime.is_bypassed = before


def bound_runtime(transformer: Any) -> Runtime | None:
    """The runtime that `compile_pipeline` gave this transformer, if any."""
    return transformer.__dict__.get(_ATTRIBUTE)


def _transformer(pipe: Any) -> Any:
    if not isinstance(pipe, _PIPELINES):
        supported = ", ".join(cls.__name__ for cls in _PIPELINES)
        raise NotImplementedError(
            f"pipe is a {type(pipe).__name__}; supported pipelines are {supported}. Run this one without afcache."
        )
    return pipe.transformer


def require_runtime(pipe: Any) -> Runtime:
    """The runtime of a pipeline that was compiled.

    Raises:
        ValueError: it was not, or it was restored already.

    """
    transformer = getattr(pipe, "transformer", None)
    runtime = bound_runtime(transformer) if isinstance(transformer, torch.nn.Module) else None
    if runtime is None:
        raise ValueError(
            f"pipe was not passed to afcache.compile_pipeline, or it was restored already (got a {type(pipe).__name__}). Call "
            "afcache.compile_pipeline(pipe) first."
        )
    return runtime


def _check_forward(transformer: Any) -> None:
    """Refuse a root forward that is neither the class's nor accelerate's: binding ours would bypass it."""
    if transformer._compiled_call_impl is not None:
        raise NotImplementedError(
            "transformer was compiled in place by transformer.compile(). Load it afresh: compile_pipeline compiles it."
        )
    forward = transformer.__dict__.get("forward")
    is_own = getattr(forward, "__func__", None) is type(transformer).forward
    if forward is not None and not is_own and not hasattr(transformer, "_hf_hook"):
        raise NotImplementedError(
            f"transformer.forward was replaced by {forward!r} (by a diffusers hook, such as group offload with streams, or by "
            "hand), which a cached forward would bypass. Remove that first, or run without afcache."
        )


def _connect(parallel: ParallelConfig, transformer: Any) -> ParallelContext:
    check_heads(parallel, transformer.config.num_attention_heads)
    check_device(transformer.device)
    if parallel.ring_degree > 1 and flux1.attention_backend(transformer) is not None:
        raise ValueError(
            f"ring_degree must be 1 under an attention backend, got {parallel.ring_degree}: a ring merges softmaxes, which "
            "backends do not return. Use ulysses_degree, or call transformer.reset_attention_backend()."
        )
    return connect(parallel)


def _check_foresight(decide_ahead: bool, config: CacheConfig, parallel: ParallelConfig | None) -> None:
    """Refuse to decide ahead where a step's decision needs the step itself, or other ranks."""
    if not isinstance(decide_ahead, bool):
        raise TypeError(f"decide_ahead must be True or False, got {decide_ahead!r}.")
    if not decide_ahead:
        return
    if parallel is not None:
        raise NotImplementedError(
            f"decide_ahead=True cannot be combined with parallel={parallel!r} yet: ranks agree within the step. Leave it out."
        )
    if config.is_gated or config.layerwise is not None:
        what = "layerwise" if config.layerwise is not None else f"policy {config.policy!r}"
        raise ValueError(
            f"decide_ahead must be False under {what}, got True: it decides by what it sees of each step. Leave it out, or use "
            "policy 'adaptive', 'fixed', 'growing', 'magcache' or 'planned' without groups."
        )


def _check_options(options: CompileOptions) -> None:
    """Raise at once for a backend or mode that torch.compile would refuse at the first image."""
    if options.mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, _MODES))}, got {options.mode!r}.")
    if options.enabled and isinstance(options.backend, str):
        known = torch._dynamo.list_backends(exclude_tags=())
        if options.backend not in known:
            raise ValueError(f"backend must be a callable or one of {', '.join(known)}, got {options.backend!r}.")


def _bind(transformer: Any) -> None:
    """Put our forward where the original would be called, and remember what was there.

    Where accelerate has installed a hook, its wrapper calls `_old_forward` and puts that back as `forward` after each
    image; binding `forward` would be undone by it.
    """
    name = "_old_forward" if hasattr(transformer, "_hf_hook") else "forward"
    transformer.__dict__[_ORIGINAL] = transformer.__dict__.get(name)
    transformer.__dict__[name] = types.MethodType(_forward, transformer)


def _put_back(transformer: Any, name: str) -> None:
    """Undo `_bind` at the place where accelerate may have moved our forward since."""
    original = transformer.__dict__.get(_ORIGINAL)
    if original is None and name == "forward":
        del transformer.__dict__[name]
    else:
        transformer.__dict__[name] = original or types.MethodType(type(transformer).forward, transformer)


def _is_ours(method: object) -> bool:
    return isinstance(method, types.MethodType) and method.__func__ is _forward


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The bound method: cached, or the host's own inside `uncached` and where a wrapper outlived `restore_pipeline`."""
    runtime = bound_runtime(self)
    forward = type(self).forward if runtime is None or runtime.is_bypassed else _cached_forward
    return forward(self, *args, **kwargs)


@apply_lora_scale("joint_attention_kwargs")
def _cached_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
    img_ids: Tensor,
    txt_ids: Tensor,
    guidance: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    controlnet_block_samples: Any = None,
    controlnet_single_block_samples: Any = None,
    return_dict: bool = True,
    controlnet_blocks_repeat: bool = False,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """FluxTransformer2DModel.forward with a cache."""
    options = dict(joint_attention_kwargs or {})
    image_prompts = options.pop("ip_adapter_image_embeds", None) or ()
    if options:
        raise NotImplementedError(
            f"joint_attention_kwargs {sorted(options)} are not supported under caching ('scale' and "
            "'ip_adapter_image_embeds' are). Leave them out, or call afcache.restore_pipeline(pipe) first."
        )
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "gradient mode is on, and a cached forward has no gradient. Wrap the call in torch.no_grad(), or call "
            "afcache.restore_pipeline(pipe) before training."
        )
    inputs = flux1.FluxInputs(
        hidden_states=hidden_states,
        encoder_hidden_states=encoder_hidden_states,
        pooled_projections=pooled_projections,
        timestep=timestep,
        img_ids=img_ids[0] if img_ids.ndim == 3 else img_ids,
        txt_ids=txt_ids[0] if txt_ids.ndim == 3 else txt_ids,
        guidance=guidance,
        controlnet_block_samples=tuple(controlnet_block_samples or ()),
        controlnet_single_block_samples=tuple(controlnet_single_block_samples or ()),
        controlnet_blocks_repeat=bool(controlnet_blocks_repeat),
        image_prompts=tuple(image_prompts),
    )
    runtime = bound_runtime(self)
    assert runtime is not None
    velocity = runtime.forward(inputs)
    # Pipelines throw away what is said of reference images, so it is not computed.
    missing = hidden_states.shape[1] - velocity.shape[1]
    velocity = F.pad(velocity, (0, 0, 0, missing)) if missing else velocity
    return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)
