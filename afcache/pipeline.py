"""compile_pipeline and restore_pipeline: binding our forward to a diffusers pipeline. The only torch.compile is here."""

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor

from afcache.config import CacheConfig, resolve_config
from afcache.models import flux
from afcache.runtime import CompileOptions, Runtime
from afcache.schedule import check_scheduler

_ATTRIBUTE = "_afcache"
_PIPELINES = (FluxPipeline, FluxImg2ImgPipeline)
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
) -> PipelineT:
    """Make a FLUX pipeline sample faster, in place.

    Our forward is bound to the transformer instance; no class is changed, and saving, LoRA, offload, `from_pipe` and
    `deepcopy` work as before. Calling it again replaces the settings. Pipelines that share the transformer share them
    too; one that has a scheduler of its own must be passed here as well.

    Args:
        pipe: a FluxPipeline or FluxImg2ImgPipeline.
        config: complete settings; excludes `tolerance` and `preset`.
        tolerance: error budget between refreshes; 0 computes every step.
        preset: "quality", "balanced" (default) or "fast".
        compile: compile the forward as one graph; False runs it eagerly.
        backend: torch.compile's backend.
        mode: torch.compile's mode.
        dynamic: torch.compile's dynamic shapes; None lets a second shape make them dynamic.

    Returns:
        the same pipeline.

    Raises:
        NotImplementedError: the pipeline, its transformer or its scheduler is not supported; the message says what is.
        ValueError: conflicting or invalid settings.
    Cost:
        Memory: order + 1 residuals of the image tokens per guidance branch (24 MiB each for FLUX.1 at 1024 x 1024 in
        bfloat16). The first image also pays for compilation.

    """
    settings = resolve_config(config, tolerance=tolerance, preset=preset)
    transformer = _transformer(pipe)
    flux.check_transformer(transformer)
    _check_hooks(transformer)
    check_scheduler(pipe.scheduler)  # pyright: ignore[reportAttributeAccessIssue]
    options = CompileOptions(enabled=compile, backend=backend, mode=mode, dynamic=dynamic)
    runtime = Runtime(transformer, settings, options, torch.compile)
    previous = bound_runtime(transformer)
    for served in [*(previous.pipes() if previous is not None else []), pipe]:
        runtime.serve(served)
    if previous is None:
        _bind(transformer)
    setattr(transformer, _ATTRIBUTE, runtime)
    return pipe


def restore_pipeline(pipe: PipelineT) -> PipelineT:
    """Undo `compile_pipeline`: the transformer runs its own forward again, for every pipeline that shares it.

    Raises:
        ValueError: the pipeline was not compiled by `compile_pipeline`.

    """
    transformer = _transformer(pipe)
    if bound_runtime(transformer) is None:
        raise ValueError("pipe was not passed to afcache.compile_pipeline, or it was restored already; nothing to restore.")
    for name in ("forward", "_old_forward"):
        if _is_ours(transformer.__dict__.get(name)):
            if name == "forward":
                del transformer.__dict__[name]
            else:
                transformer.__dict__[name] = types.MethodType(type(transformer).forward, transformer)
    delattr(transformer, _ATTRIBUTE)
    return pipe


@contextlib.contextmanager
def uncached(pipe: Any) -> Iterator[None]:
    """Run the transformer's own forward inside the block; the compiled one, its settings and its report stay.

    Raises:
        ValueError: the pipeline was not compiled by `compile_pipeline`.

    """
    transformer = _transformer(pipe)
    runtime = bound_runtime(transformer)
    restore_pipeline(pipe)
    assert runtime is not None
    try:
        yield
    finally:
        _bind(transformer)
        setattr(transformer, _ATTRIBUTE, runtime)


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


def _check_hooks(transformer: Any) -> None:
    """Refuse what a functional forward would bypass or break."""
    if getattr(transformer, "is_cache_enabled", False):
        raise NotImplementedError(
            "transformer already has a diffusers cache enabled. Call transformer.disable_cache() before compile_pipeline."
        )
    if transformer._compiled_call_impl is not None:
        raise NotImplementedError(
            "transformer was compiled in place by transformer.compile(). Load it afresh: compile_pipeline compiles it."
        )
    for name in ("transformer_blocks", "single_transformer_blocks"):
        for index, block in enumerate(getattr(transformer, name)):
            registry = getattr(block, "_diffusers_hook", None)
            hooks = sorted(registry.hooks) if registry is not None else []
            if hooks:
                raise NotImplementedError(
                    f"{name}[{index}] has diffusers hooks {hooks}, which act on whole blocks and would be bypassed. Use model "
                    "offload or leaf-level group offload instead of block-level, and no other cache."
                )


def _bind(transformer: Any) -> None:
    """Put our forward where the original would be called.

    Where accelerate has installed a hook, its wrapper calls `_old_forward` and puts that back as `forward` after each
    image; binding `forward` would be undone by it.
    """
    name = "_old_forward" if hasattr(transformer, "_hf_hook") else "forward"
    transformer.__dict__[name] = types.MethodType(_forward, transformer)


def _is_ours(method: object) -> bool:
    return isinstance(method, types.MethodType) and method.__func__ is _forward


@apply_lora_scale("joint_attention_kwargs")
def _forward(
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
    del controlnet_blocks_repeat
    if controlnet_block_samples is not None or controlnet_single_block_samples is not None:
        raise NotImplementedError(
            "controlnet_block_samples are not supported under caching yet. Call afcache.restore_pipeline(pipe) first."
        )
    if joint_attention_kwargs:
        raise NotImplementedError(
            f"joint_attention_kwargs {sorted(joint_attention_kwargs)} are not supported under caching ('scale' is). Leave "
            "them out, unload the IP-Adapter, or call afcache.restore_pipeline(pipe) first."
        )
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "gradient mode is on, and a cached forward has no gradient. Wrap the call in torch.no_grad(), or call "
            "afcache.restore_pipeline(pipe) before training."
        )
    inputs = flux.FluxInputs(
        hidden_states=hidden_states,
        encoder_hidden_states=encoder_hidden_states,
        pooled_projections=pooled_projections,
        timestep=timestep,
        img_ids=img_ids[0] if img_ids.ndim == 3 else img_ids,
        txt_ids=txt_ids[0] if txt_ids.ndim == 3 else txt_ids,
        guidance=guidance,
    )
    runtime = bound_runtime(self)
    assert runtime is not None
    velocity = runtime.forward(inputs)
    return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)
