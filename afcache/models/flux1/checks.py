"""Whether our forward computes exactly what a FLUX.1 transformer would."""

from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from diffusers.utils import logging

from afcache._typing import HostModule
from afcache.models.flux1.architecture import sizes
from afcache.models.flux1.call import Reader
from afcache.settings.config import CacheConfig
from afcache.settings.policies import FLUX_MAGNITUDE_RATIOS

logger = logging.get_logger(__name__)
# Of FLUX.1-dev: 19 double and 38 single ones.
_DEV_BLOCKS = 57


def check_transformer(transformer: HostModule) -> None:
    """Raise unless our forward computes exactly what this transformer would.

    Raises:
        NotImplementedError: an attention processor that we do not know, or tensor or context parallelism of diffusers.

    """
    for name, processor in transformer.attn_processors.items():
        if not isinstance(processor, FluxAttnProcessor | FluxIPAdapterAttnProcessor):
            raise NotImplementedError(
                f"attention processor {type(processor).__name__} at {name} is not supported (diffusers' own and its "
                "IP-Adapter's are). Put diffusers' back with transformer.set_attn_processor(FluxAttnProcessor()), or let the "
                "model run its own forward: compile_pipeline(pipe, compile='blocks')."
            )
        if processor._parallel_config is not None:
            raise NotImplementedError(
                f"attention processor at {name} runs under diffusers' context parallelism, which is not supported. "
                "Run on one device, or let the model run its own forward: "
                "compile_pipeline(pipe, compile='blocks')."
            )


def check_config(transformer: HostModule, config: CacheConfig) -> None:
    """Raise unless the settings fit the number of blocks; warn where they hold what was measured on another model.

    Raises:
        ValueError: naming the setting and the number.

    """
    blocks = sizes(transformer).num_blocks
    if config.num_groups > blocks:
        raise ValueError(f"groups must be at most the number of blocks of the transformer, {blocks}, got {config.num_groups}.")
    if config.first_blocks + config.last_blocks >= blocks:
        raise ValueError(
            f"first_blocks + last_blocks must be less than the number of blocks of the transformer, {blocks}, got "
            f"{config.first_blocks} + {config.last_blocks}: none would be left to cache."
        )
    is_dev = blocks == _DEV_BLOCKS and transformer.config.guidance_embeds
    if config.magnitude_ratios == FLUX_MAGNITUDE_RATIOS and not is_dev:
        logger.warning(
            f"Policy 'magcache' goes by ratios that were measured on FLUX.1-dev, {_DEV_BLOCKS} blocks; this transformer has "
            f"{blocks}. Measure its own: policy('magcache', magnitude_ratios=afcache.calibrate_magnitudes(pipe, prompts))."
        )


def check_call(reader: Reader, config: CacheConfig, *, shares_sequence: bool) -> None:
    """Raise where reference images cannot be taken.

    Args:
        reader: of the call.
        config: settings.
        shares_sequence: whether ranks share its tokens.

    Raises:
        NotImplementedError: groups of blocks, or ranks that share a sequence.

    """
    if not reader.has_context:
        return
    check_groups(config)
    if shares_sequence:
        raise NotImplementedError(
            "reference images (Kontext) cannot be shared among the ranks of a sequence yet. Use cfg_degree or data_degree "
            "instead of ulysses_degree and ring_degree."
        )


def check_blocks(transformer: HostModule) -> None:
    """Raise where something is attached to a module whose forward ours replaces: it would be bypassed in silence.

    Raises:
        NotImplementedError: naming the module and what is attached to it.

    """
    for name in ("transformer_blocks", "single_transformer_blocks"):
        for index, block in enumerate(getattr(transformer, name)):
            for path, module in ((f"{name}[{index}]", block), (f"{name}[{index}].attn", block.attn)):
                attached = _attached(module)
                if attached:
                    raise NotImplementedError(
                        f"{path} has {attached}, which a cached forward would bypass: it calls the layers inside, not the "
                        "block. Remove it, or let the model run its own forward: "
                        "compile_pipeline(pipe, compile='blocks')."
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


def check_groups(config: CacheConfig) -> None:
    """Raise where a call with reference images meets groups of blocks.

    Raises:
        NotImplementedError: it does.

    """
    if config.layerwise is not None:
        raise NotImplementedError(
            "groups of blocks (Layerwise) do not know reference images (Kontext) yet. Leave out layerwise=."
        )
