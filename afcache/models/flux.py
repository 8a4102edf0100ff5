"""FLUX.1: diffusers' FluxTransformer2DModel as an `Architecture`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from afcache._typing import AttentionMap, Features, HostModule, Scalar, Tokens, Velocity, typed
from afcache.config import CacheConfig
from afcache.functional.architecture import Architecture, Lengths, Part, Parts, TokenAxes
from afcache.functional.attention import AttentionKernel, mean_attention_map, scaled_dot_product_attention
from afcache.functional.blocks import modulate_double, modulate_single
from afcache.functional.stack import Blocks, Embedded, run_part, run_stack


class FluxInputs(NamedTuple):
    """What diffusers hands to `FluxTransformer2DModel.forward`, without options.

    Attributes:
        hidden_states: packed latents `[batch, img_seq, channels]`.
        encoder_hidden_states: T5 embeddings `[batch, txt_seq, joint_attention_dim]`.
        pooled_projections: pooled CLIP embeddings `[batch, pooled_projection_dim]`.
        timestep: `[batch]`, in [0, 1].
        img_ids: image positions `[img_seq, 3]`.
        txt_ids: text positions `[txt_seq, 3]`.
        guidance: distilled guidance scale `[batch]`, or None for models without guidance embedding.

    """

    hidden_states: Tensor
    encoder_hidden_states: Tensor
    pooled_projections: Tensor
    timestep: Tensor
    img_ids: Tensor
    txt_ids: Tensor
    guidance: Tensor | None


@typed
def embed(transformer: HostModule, inputs: FluxInputs) -> Embedded:
    """Embed latents, timestep, guidance and pooled text with the host's own modules.

    Args:
        transformer: the host's `FluxTransformer2DModel`.
        inputs: as diffusers hands them over; timestep in [0, 1].

    Returns:
        image tokens of width `dim` and the conditioning vector; fresh.

    """
    hidden_states = transformer.x_embedder(inputs.hidden_states)
    timestep = inputs.timestep.to(hidden_states.dtype) * 1000
    if inputs.guidance is None:
        temb = transformer.time_text_embed(timestep, inputs.pooled_projections)
    else:
        guidance = inputs.guidance.to(hidden_states.dtype) * 1000
        temb = transformer.time_text_embed(timestep, guidance, inputs.pooled_projections)
    return Embedded(hidden_states, temb)


@typed
def stack(transformer: HostModule, inputs: FluxInputs, embedded: Embedded, kernel: AttentionKernel) -> Features:
    """Embed text and positions, and run the double- and single-stream blocks.

    Args:
        transformer: the host's `FluxTransformer2DModel`.
        inputs: as diffusers hands them over.
        embedded: from `embed`.
        kernel: the attention kernel.

    Returns:
        image tokens.

    """
    return run_stack(
        Blocks(transformer.transformer_blocks, transformer.single_transformer_blocks),
        embedded,
        transformer.context_embedder(inputs.encoder_hidden_states),
        image_rotary_emb=transformer.pos_embed(torch.cat((inputs.txt_ids, inputs.img_ids), dim=0)),
        kernel=kernel,
    )


@typed
def head(transformer: HostModule, hidden_states: Features, temb: Tensor) -> Velocity:
    """Modulate, normalise and project the image tokens to a velocity.

    Args:
        transformer: the host's `FluxTransformer2DModel`.
        hidden_states: image tokens after the blocks.
        temb: conditioning vector `[batch, dim]`.

    """
    return transformer.proj_out(transformer.norm_out(hidden_states, temb))


@typed
def place(inputs: FluxInputs, latents: Velocity, sigma: Scalar) -> FluxInputs:
    """The same sample at another point of its trajectory.

    Args:
        inputs: conditioning and positions; their latents and timestep are replaced.
        latents: packed latents.
        sigma: noise level, which is the timestep in [0, 1].

    """
    return inputs._replace(hidden_states=latents, timestep=sigma.expand(latents.shape[0]))


def probe_inputs(transformer: HostModule, *, dtype: torch.dtype, device: torch.device | str) -> FluxInputs:
    """A small pseudo-random sample at sigma 1, always the same, for measurements on the model alone."""
    settings = transformer.config
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    rows = torch.arange(8.0, device=device)
    return FluxInputs(
        hidden_states=draw(1, 64, settings.in_channels),
        encoder_hidden_states=draw(1, 16, settings.joint_attention_dim),
        pooled_projections=draw(1, settings.pooled_projection_dim),
        timestep=torch.ones(1, device=device, dtype=dtype),
        img_ids=torch.cartesian_prod(torch.zeros(1, device=device), rows, rows),
        txt_ids=torch.zeros(16, 3, device=device),
        guidance=torch.full((1,), 3.5, device=device, dtype=torch.float32) if settings.guidance_embeds else None,
    )


def num_blocks(transformer: HostModule) -> int:
    """How many blocks one full forward evaluates."""
    return len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)


@typed
def open_tokens(transformer: HostModule, inputs: FluxInputs, embedded: Embedded) -> Tokens:
    """Text and image tokens before the first block, text first."""
    return torch.cat([transformer.context_embedder(inputs.encoder_hidden_states), embedded.hidden_states], dim=1)


@typed
def run(
    transformer: HostModule,
    inputs: FluxInputs,
    tokens: Tokens,
    temb: Tensor,
    kernel: AttentionKernel,
    part: Part,
    attention: Tensor | None,
) -> tuple[Tokens, list[Tokens]]:
    """Run a part of the stack.

    Args:
        transformer: the host's `FluxTransformer2DModel`.
        inputs: as diffusers hands them over.
        tokens: text first.
        temb: conditioning vector `[batch, dim]`.
        kernel: the attention kernel.
        part: which blocks.
        attention: outputs to reuse, `[blocks, batch, seq, dim]`, or None.

    Returns:
        the tokens after it, and the attention output of each of its blocks.

    """
    double, single = list(transformer.transformer_blocks), list(transformer.single_transformer_blocks)
    offset = len(double)
    return run_part(
        Blocks(double[part.start : part.stop], single[max(0, part.start - offset) : max(0, part.stop - offset)]),
        tokens,
        txt_seq=inputs.encoder_hidden_states.shape[1],
        temb=temb,
        image_rotary_emb=transformer.pos_embed(torch.cat((inputs.txt_ids, inputs.img_ids), dim=0)),
        kernel=kernel,
        attention=attention,
    )


@typed
def observe(transformer: HostModule, hidden_states: Features, temb: Tensor) -> Features:
    """Image tokens as the first block's attention would see them: TeaCache's signal."""
    return transformer.transformer_blocks[0].norm1(hidden_states, emb=temb)[0]


@typed
def modulate(transformer: HostModule, tokens: Tokens, temb: Tensor, index: int, txt_seq: int) -> Tokens:
    """Tokens, text first, as the attention of block `index` would see them."""
    double = len(transformer.transformer_blocks)
    if index < double:
        return modulate_double(transformer.transformer_blocks[index], tokens[:, txt_seq:], tokens[:, :txt_seq], temb)
    return modulate_single(transformer.single_transformer_blocks[index - double], tokens, temb)


@typed
def attention_map(transformer: HostModule, modulated: Tokens, index: int, txt_seq: int) -> AttentionMap:
    """The attention map of block `index` over the given modulated tokens, averaged over heads; float32."""
    double = len(transformer.transformer_blocks)
    if index < double:
        attn = transformer.transformer_blocks[index].attn
        return mean_attention_map(attn, modulated[:, txt_seq:], modulated[:, :txt_seq])
    return mean_attention_map(transformer.single_transformer_blocks[index - double].attn, modulated, None)


@typed
def token_lengths(inputs: FluxInputs) -> Lengths:
    """How many text and image tokens there are."""
    return Lengths(inputs.encoder_hidden_states.shape[1], inputs.hidden_states.shape[1])


def split_tokens(inputs: FluxInputs, take: Callable[[Tensor, int], Tensor]) -> FluxInputs:
    """The inputs with `take(tensor, axis)` in place of everything that has an axis of tokens."""
    return inputs._replace(
        hidden_states=take(inputs.hidden_states, 1),
        encoder_hidden_states=take(inputs.encoder_hidden_states, 1),
        img_ids=take(inputs.img_ids, 0),
        txt_ids=take(inputs.txt_ids, 0),
    )


PARTS = Parts(num_blocks=num_blocks, open=open_tokens, run=run, observe=observe, modulate=modulate, attention_map=attention_map)
AXES = TokenAxes(lengths=token_lengths, split=split_tokens)
FLUX = Architecture(embed=embed, stack=stack, head=head, place=place, parts=PARTS, axes=AXES)


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
        if type(processor) is not FluxAttnProcessor:
            raise NotImplementedError(
                f"attention processor {type(processor).__name__} at {name} is not supported (IP-Adapter and custom "
                "processors are not cached yet). Unload it, e.g. pipe.unload_ip_adapter(), or call "
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


def attention_backend(transformer: HostModule) -> Any:
    """The name that `transformer.set_attention_backend` chose, or None for torch's own kernels.

    Raises:
        NotImplementedError: backends differ between blocks.

    """
    backends = {processor._attention_backend for processor in transformer.attn_processors.values()}
    if len(backends) > 1:
        raise NotImplementedError(
            f"attention backends differ between blocks ({sorted(map(str, backends))}); set one for the whole model with "
            "transformer.set_attention_backend(name)."
        )
    return backends.pop() if backends else None


def attention_kernel(transformer: HostModule) -> AttentionKernel:
    """The kernel of `attention_backend`: diffusers' dispatcher, or torch's scaled dot product attention."""
    backend = attention_backend(transformer)
    if backend is None:
        return scaled_dot_product_attention

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        by_token = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return dispatch_attention_fn(*by_token, backend=backend).transpose(1, 2)

    return kernel
