"""FLUX.1: diffusers' FluxTransformer2DModel as an `Architecture`."""

import torch
from torch import Tensor

from afcache._typing import AttentionMap, Features, HostModule, Tokens, Velocity, typed
from afcache.functional.model import Architecture, Embedded, Model, Part, Parts, Sizes, TokenAxes
from afcache.models.flux1.attention import mean_attention_map
from afcache.models.flux1.blocks import modulate_double, modulate_single
from afcache.models.flux1.inputs import FluxInputs, latents_of, place, prefix_length, split_tokens, token_lengths
from afcache.models.flux1.stack import Blocks, Control, run_part, run_stack


@typed
def embed(transformer: HostModule, inputs: FluxInputs) -> Embedded:
    """Embed latents, timestep, guidance and pooled text with the host's own modules.

    Args:
        transformer: the host's `FluxTransformer2DModel`.
        inputs: as diffusers hands them over; timestep in [0, 1].

    Returns:
        image tokens of width `dim` and the conditioning vector; fresh.

    """
    hidden_states = transformer.x_embedder(_visible_channels(inputs))
    timestep = inputs.timestep.to(hidden_states.dtype) * 1000
    if inputs.guidance is None:
        temb = transformer.time_text_embed(timestep, inputs.pooled_projections)
    else:
        guidance = inputs.guidance.to(hidden_states.dtype) * 1000
        temb = transformer.time_text_embed(timestep, guidance, inputs.pooled_projections)
    return Embedded(hidden_states, temb)


def _visible_channels(inputs: FluxInputs) -> Tensor:
    """Latents, and what is shown beside them: `[batch, img_seq, in_channels]`."""
    if inputs.condition is None:
        return inputs.hidden_states
    return torch.cat([inputs.hidden_states, inputs.condition], dim=2)


@typed
def stack(model: Model, inputs: FluxInputs, embedded: Embedded) -> Features:
    """Embed text and positions, and run the double- and single-stream blocks.

    Args:
        model: of the host's `FluxTransformer2DModel`.
        inputs: as diffusers hands them over.
        embedded: from `embed`.

    Returns:
        image tokens.

    """
    transformer = model.transformer
    blocks = Blocks(transformer.transformer_blocks, transformer.single_transformer_blocks)
    context = _embed_context(transformer, inputs)
    everything = torch.cat([*context, embedded.hidden_states], dim=1)
    tokens = run_stack(
        blocks,
        embedded._replace(hidden_states=everything),
        transformer.context_embedder(inputs.encoder_hidden_states),
        image_rotary_emb=transformer.pos_embed(_positions(inputs)),
        kernel=model.kernel,
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


def num_double(transformer: HostModule) -> int:
    """How many double-stream blocks there are."""
    return len(transformer.transformer_blocks)


def sizes(transformer: HostModule) -> Sizes:
    """What is fixed of the host's `FluxTransformer2DModel`."""
    return Sizes(
        num_blocks=num_double(transformer) + len(transformer.single_transformer_blocks),
        dim=transformer.inner_dim,
        heads=transformer.config.num_attention_heads,
        channels=transformer.proj_out.out_features,
    )


@typed
def open_tokens(transformer: HostModule, inputs: FluxInputs, embedded: Embedded) -> Tokens:
    """Tokens before the first block: text, reference images, image."""
    text = transformer.context_embedder(inputs.encoder_hidden_states)
    return torch.cat([text, *_embed_context(transformer, inputs), embedded.hidden_states], dim=1)


@typed
def run(
    model: Model, inputs: FluxInputs, tokens: Tokens, temb: Tensor, part: Part, attention: Tensor | None
) -> tuple[Tokens, list[Tokens]]:
    """Run a part of the stack.

    Args:
        model: of the host's `FluxTransformer2DModel`.
        inputs: as diffusers hands them over.
        tokens: text first.
        temb: conditioning vector `[batch, dim]`.
        part: which blocks.
        attention: outputs to reuse, `[blocks, batch, seq, dim]`, or None.

    Returns:
        the tokens after it, and the attention output of each of its blocks.

    """
    transformer = model.transformer
    control, offset = _control(transformer, inputs), num_double(transformer)
    of_double = slice(part.start, part.stop)
    of_single = slice(max(0, part.start - offset), max(0, part.stop - offset))
    return run_part(
        Blocks(list(transformer.transformer_blocks)[of_double], list(transformer.single_transformer_blocks)[of_single]),
        tokens,
        txt_seq=inputs.encoder_hidden_states.shape[1],
        temb=temb,
        image_rotary_emb=transformer.pos_embed(_positions(inputs)),
        kernel=model.kernel,
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


def image_prompt_scales(transformer: HostModule) -> tuple[tuple[float, ...], ...]:
    """How much every double-stream block heeds each IP-Adapter's image prompts: what `set_ip_adapter_scale` set."""
    return tuple(tuple(block.attn.processor.scale) for block in transformer.transformer_blocks)


PARTS = Parts(
    prefix_length=prefix_length, open=open_tokens, run=run, observe=observe, modulate=modulate, attention_map=attention_map
)
AXES = TokenAxes(lengths=token_lengths, split=split_tokens)
FLUX = Architecture(sizes=sizes, embed=embed, stack=stack, head=head, place=place, latents=latents_of, parts=PARTS, axes=AXES)
