"""FLUX.1: diffusers' FluxTransformer2DModel as an `Architecture`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from afcache._typing import AttentionMap, Features, HostModule, Scalar, Tokens, Velocity, typed
from afcache.functional.model import (
    Architecture,
    AttentionKernel,
    Embedded,
    Lengths,
    Part,
    Parts,
    TokenAxes,
    scaled_dot_product_attention,
)
from afcache.models.flux1.attention import mean_attention_map
from afcache.models.flux1.blocks import modulate_double, modulate_single
from afcache.models.flux1.stack import Blocks, Control, run_part, run_stack


class FluxInputs(NamedTuple):
    """What diffusers hands to `FluxTransformer2DModel.forward`, without options.

    Attributes:
        hidden_states: packed latents `[batch, img_seq, channels]`; pipelines append the channels of `condition` themselves.
        encoder_hidden_states: T5 embeddings `[batch, txt_seq, joint_attention_dim]`.
        pooled_projections: pooled CLIP embeddings `[batch, pooled_projection_dim]`.
        timestep: `[batch]`, in [0, 1].
        img_ids: image positions `[img_seq, 3]`.
        txt_ids: text positions `[txt_seq, 3]`.
        guidance: distilled guidance scale `[batch]`, or None for models without guidance embedding.
        controlnet_block_samples: a ControlNet's residuals for the double-stream blocks, each `[batch, img_seq, dim]`; fewer
            than blocks are spread over them.
        controlnet_single_block_samples: the same for the single-stream blocks.
        controlnet_blocks_repeat: residuals of double-stream blocks go round instead of being spread.
        image_prompts: embeddings of an IP-Adapter's images, one for each adapter.
        image_prompt_scales: how much they count, float32 `[double-stream blocks, adapters]`; None reads the adapters' own.
        context: packed latents of reference images (Kontext), `[batch, context_seq, channels]`: tokens that the blocks see,
            and that are no part of the image.
        context_ids: their positions `[context_seq, 3]`.
        condition: channels that the transformer sees beside the latents' (Control, Fill), `[batch, img_seq, others]`.

    """

    hidden_states: Tensor
    encoder_hidden_states: Tensor
    pooled_projections: Tensor
    timestep: Tensor
    img_ids: Tensor
    txt_ids: Tensor
    guidance: Tensor | None
    controlnet_block_samples: tuple[Tensor, ...] = ()
    controlnet_single_block_samples: tuple[Tensor, ...] = ()
    controlnet_blocks_repeat: bool = False
    image_prompts: tuple[Tensor, ...] = ()
    image_prompt_scales: Tensor | None = None
    context: Tensor | None = None
    context_ids: Tensor | None = None
    condition: Tensor | None = None


@typed
def embed(transformer: HostModule, inputs: FluxInputs) -> Embedded:
    """Embed latents, timestep, guidance and pooled text with the host's own modules.

    Args:
        transformer: the host's `FluxTransformer2DModel`.
        inputs: as diffusers hands them over; timestep in [0, 1].

    Returns:
        image tokens of width `dim` and the conditioning vector; fresh.

    """
    hidden_states = transformer.x_embedder(_channels(inputs))
    timestep = inputs.timestep.to(hidden_states.dtype) * 1000
    if inputs.guidance is None:
        temb = transformer.time_text_embed(timestep, inputs.pooled_projections)
    else:
        guidance = inputs.guidance.to(hidden_states.dtype) * 1000
        temb = transformer.time_text_embed(timestep, guidance, inputs.pooled_projections)
    return Embedded(hidden_states, temb)


def _channels(inputs: FluxInputs) -> Tensor:
    """Latents, and what is shown beside them."""
    if inputs.condition is None:
        return inputs.hidden_states
    return torch.cat([inputs.hidden_states, inputs.condition], dim=2)


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
    blocks = Blocks(transformer.transformer_blocks, transformer.single_transformer_blocks)
    context = _embed_context(transformer, inputs)
    everything = torch.cat([*context, embedded.hidden_states], dim=1)
    tokens = run_stack(
        blocks,
        embedded._replace(hidden_states=everything),
        transformer.context_embedder(inputs.encoder_hidden_states),
        image_rotary_emb=transformer.pos_embed(_positions(inputs)),
        kernel=kernel,
        control=_control(transformer, inputs),
    )
    return tokens[:, everything.shape[1] - embedded.hidden_states.shape[1] :]


def _embed_context(transformer: HostModule, inputs: FluxInputs) -> list[Tensor]:
    """Tokens of reference images, which come before the image's own: there may be none."""
    return [] if inputs.context is None else [transformer.x_embedder(inputs.context)]


def _positions(inputs: FluxInputs) -> Tensor:
    """Of text, reference images and image, in this order; `[seq, 3]`."""
    context = [] if inputs.context_ids is None else [inputs.context_ids]
    return torch.cat([inputs.txt_ids, *context, inputs.img_ids], dim=0)


def _control(transformer: HostModule, inputs: FluxInputs) -> Control:
    """A ControlNet's residuals, one for each block, and embedded image prompts."""
    image_prompts = ()
    if inputs.image_prompts:
        # [batch, images, prompt_seq, dim]
        projected = transformer.encoder_hid_proj(list(inputs.image_prompts))
        image_prompts = tuple(prompt.flatten(1, 2) for prompt in projected)
    return Control(
        spread(inputs.controlnet_block_samples, num_double(transformer), repeats=inputs.controlnet_blocks_repeat),
        spread(inputs.controlnet_single_block_samples, len(transformer.single_transformer_blocks)),
        image_prompts,
        None if inputs.image_prompt_scales is None else inputs.image_prompt_scales.unbind(),
    )


def spread(samples: tuple[Tensor, ...], count: int, *, repeats: bool = False) -> list[Tensor]:
    """One sample for each of `count` blocks: each serves a run of equal length, or they go round."""
    if not samples:
        return []
    run = -(-count // len(samples))
    return [samples[index % len(samples) if repeats else index // run] for index in range(count)]


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


def num_double(transformer: HostModule) -> int:
    """How many double-stream blocks there are."""
    return len(transformer.transformer_blocks)


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
    return num_double(transformer) + len(transformer.single_transformer_blocks)


@typed
def open_tokens(transformer: HostModule, inputs: FluxInputs, embedded: Embedded) -> Tokens:
    """Tokens before the first block: text, reference images, image."""
    text = transformer.context_embedder(inputs.encoder_hidden_states)
    return torch.cat([text, *_embed_context(transformer, inputs), embedded.hidden_states], dim=1)


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
    control, offset = _control(transformer, inputs), num_double(transformer)
    of_double = slice(part.start, part.stop)
    of_single = slice(max(0, part.start - offset), max(0, part.stop - offset))
    return run_part(
        Blocks(list(transformer.transformer_blocks)[of_double], list(transformer.single_transformer_blocks)[of_single]),
        tokens,
        txt_seq=inputs.encoder_hidden_states.shape[1],
        temb=temb,
        image_rotary_emb=transformer.pos_embed(_positions(inputs)),
        kernel=kernel,
        attention=attention,
        control=Control(
            control.double[of_double],
            control.single[of_single],
            control.image_prompts,
            None if control.scales is None else control.scales[of_double],
        ),
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


def host_arguments(inputs: FluxInputs) -> dict[str, Any]:
    """What `FluxTransformer2DModel.forward` takes for the same call."""
    assert inputs.context is None, "the host knows no context: its tokens are part of hidden_states"
    arguments = inputs._replace(hidden_states=_channels(inputs))._asdict()
    if inputs.image_prompts:
        arguments["joint_attention_kwargs"] = {"ip_adapter_image_embeds": list(inputs.image_prompts)}
    for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
        arguments[name] = arguments[name] or None
    ours = ("context", "context_ids", "condition", "image_prompts", "image_prompt_scales")
    return {name: value for name, value in arguments.items() if name not in ours}


def image_prompt_scales(transformer: HostModule) -> tuple[tuple[float, ...], ...]:
    """How much every double-stream block heeds each IP-Adapter's image prompts: what `set_ip_adapter_scale` set."""
    return tuple(tuple(block.attn.processor.scale) for block in transformer.transformer_blocks)


def prefix_length(inputs: FluxInputs) -> int:
    """Tokens that the blocks see before the image's: text and reference images."""
    return inputs.encoder_hidden_states.shape[1] + (0 if inputs.context is None else inputs.context.shape[1])


def context_length(img_ids: Tensor) -> int:
    """How many tokens at the end of a sequence belong to reference images; waits for the device.

    Kontext numbers images along the first position: 0 is the one that is drawn.
    """
    is_context = img_ids[:, 0] != 0
    count = int(is_context.sum())
    return count if count < len(img_ids) and bool(is_context[len(img_ids) - count :].all()) else 0


def split_context(inputs: FluxInputs, length: int) -> FluxInputs:
    """The inputs with the last `length` tokens as context; fresh: torch.cond takes no two views of one tensor.

    A ControlNet's residuals are for all tokens, and the blocks see the context first.
    """
    if not length:
        return inputs
    image = inputs.hidden_states.shape[1] - length

    def own(part: Tensor) -> Tensor:
        return part.clone(memory_format=torch.contiguous_format)

    return inputs._replace(
        controlnet_block_samples=tuple(sample.roll(length, 1) for sample in inputs.controlnet_block_samples),
        controlnet_single_block_samples=tuple(sample.roll(length, 1) for sample in inputs.controlnet_single_block_samples),
        hidden_states=own(inputs.hidden_states[:, :image]),
        img_ids=own(inputs.img_ids[:image]),
        context=own(inputs.hidden_states[:, image:]),
        context_ids=own(inputs.img_ids[image:]),
    )


@typed
def token_lengths(inputs: FluxInputs) -> Lengths:
    """How many text and image tokens there are."""
    return Lengths(inputs.encoder_hidden_states.shape[1], inputs.hidden_states.shape[1])


def split_tokens(inputs: FluxInputs, take: Callable[[Tensor, int], Tensor]) -> FluxInputs:
    """The inputs with `take(tensor, axis)` in place of everything that has an axis of tokens."""
    return inputs._replace(
        controlnet_block_samples=tuple(take(sample, 1) for sample in inputs.controlnet_block_samples),
        controlnet_single_block_samples=tuple(take(sample, 1) for sample in inputs.controlnet_single_block_samples),
        hidden_states=take(inputs.hidden_states, 1),
        encoder_hidden_states=take(inputs.encoder_hidden_states, 1),
        img_ids=take(inputs.img_ids, 0),
        txt_ids=take(inputs.txt_ids, 0),
        condition=None if inputs.condition is None else take(inputs.condition, 1),
    )


PARTS = Parts(num_blocks=num_blocks, open=open_tokens, run=run, observe=observe, modulate=modulate, attention_map=attention_map)
AXES = TokenAxes(lengths=token_lengths, split=split_tokens)
FLUX = Architecture(embed=embed, stack=stack, head=head, place=place, parts=PARTS, axes=AXES)


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
