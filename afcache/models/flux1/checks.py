"""Whether our forward computes exactly what a FLUX.1 transformer would."""

from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor

from afcache._typing import HostModule
from afcache.models.flux1.architecture import FluxInputs, num_blocks
from afcache.settings.config import CacheConfig


def check_transformer(transformer: object) -> None:
    """Raise unless our forward computes exactly what this transformer would.

    Raises:
        NotImplementedError: another architecture, an attention processor that we do not know, or tensor or context
            parallelism of diffusers.

    """
    if not isinstance(transformer, FluxTransformer2DModel):
        raise NotImplementedError(
            f"transformer is a {type(transformer).__name__}; only diffusers' FluxTransformer2DModel (FLUX.1) is supported. "
            "If it was wrapped by torch.compile, pass the pipeline uncompiled: compile_pipeline compiles it."
        )
    for name, processor in transformer.attn_processors.items():
        if not isinstance(processor, FluxAttnProcessor | FluxIPAdapterAttnProcessor):
            raise NotImplementedError(
                f"attention processor {type(processor).__name__} at {name} is not supported (diffusers' own and its "
                "IP-Adapter's are). Put diffusers' back with transformer.set_attn_processor(FluxAttnProcessor()), or call "
                "afcache.restore_pipeline(pipe) to run without caching."
            )
        if processor._parallel_config is not None:
            raise NotImplementedError(
                f"attention processor at {name} runs under diffusers' context parallelism, which is not supported. "
                "Run on one device, or call afcache.restore_pipeline(pipe)."
            )


def check_config(transformer: HostModule, config: CacheConfig) -> None:
    """Raise unless the settings fit the number of blocks.

    Raises:
        ValueError: naming the setting and the number.

    """
    blocks = num_blocks(transformer)
    if config.num_groups > blocks:
        raise ValueError(f"groups must be at most the number of blocks of the transformer, {blocks}, got {config.num_groups}.")
    if config.first_blocks + config.last_blocks >= blocks:
        raise ValueError(
            f"first_blocks + last_blocks must be less than the number of blocks of the transformer, {blocks}, got "
            f"{config.first_blocks} + {config.last_blocks}: none would be left to cache."
        )


def check_context(inputs: FluxInputs, config: CacheConfig) -> None:
    """Raise where the settings cannot be used with reference images.

    Raises:
        NotImplementedError: groups of blocks.

    """
    if inputs.context is not None and config.layerwise is not None:
        raise NotImplementedError(
            "groups of blocks (Layerwise) do not know reference images (Kontext) yet. Leave out layerwise=."
        )


def check_blocks(transformer: HostModule) -> None:
    """Raise where something is attached to a module whose forward ours replaces: it would be bypassed in silence.

    Raises:
        NotImplementedError: naming the module and what is attached to it.

    """
    if getattr(transformer, "is_cache_enabled", False):
        raise NotImplementedError(
            "transformer already has a diffusers cache enabled. Call transformer.disable_cache() before compile_pipeline."
        )
    for name in ("transformer_blocks", "single_transformer_blocks"):
        for index, block in enumerate(getattr(transformer, name)):
            for path, module in ((f"{name}[{index}]", block), (f"{name}[{index}].attn", block.attn)):
                attached = _attached(module)
                if attached:
                    raise NotImplementedError(
                        f"{path} has {attached}, which a cached forward would bypass: it calls the layers inside, not the "
                        "block. Remove it (instead of block-level group offload use model offload), or call "
                        "afcache.restore_pipeline(pipe)."
                    )


def _attached(module: HostModule) -> str:
    """What would act on a call of this module, in words; empty if nothing would."""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is not None and registry.hooks:
        return f"diffusers hooks {sorted(registry.hooks)}"
    if module._forward_hooks or module._forward_pre_hooks:
        return "forward hooks"
    if module._compiled_call_impl is not None:
        return "been compiled by itself (compile_repeated_blocks)"
    forward = module.__dict__.get("forward")
    is_replaced = forward is not None and getattr(forward, "__func__", None) is not type(module).forward
    return "a forward of its own" if is_replaced else ""
