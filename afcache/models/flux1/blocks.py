"""FLUX.1's two kinds of transformer block, over the host's own submodules.

diffusers' block forwards cannot be traced inside torch.cond (the attention calls `inspect.signature`), so the
mathematics is written again here and every weight stays where it is: LoRA-wrapped, quantised, cast or offloaded
linears are called like any other.
"""

import torch
from torch import Tensor

from afcache._typing import Features, HostModule, TextFeatures, Tokens, typed
from afcache.functional.model import AttentionKernel
from afcache.models.flux1.attention import RotaryEmbedding, image_prompt_attention, joint_attention, self_attention

_FLOAT16_MAX = 65504


def _clip_float16(x: Tensor) -> Tensor:
    return x.clip(-_FLOAT16_MAX, _FLOAT16_MAX) if x.dtype == torch.float16 else x


@typed
def double_stream_block(
    block: HostModule,
    hidden_states: Features,
    encoder_hidden_states: TextFeatures,
    *,
    temb: Tensor,
    image_rotary_emb: RotaryEmbedding,
    kernel: AttentionKernel,
    attention: tuple[Features, TextFeatures] | None = None,
    image_prompts: tuple[Tensor, ...] = (),
    scales: Tensor | None = None,
) -> tuple[Features, TextFeatures, tuple[Features, TextFeatures]]:
    """Run one double-stream block: joint attention, then an MLP for each stream.

    Args:
        block: the host's `FluxTransformerBlock`.
        hidden_states: image tokens.
        encoder_hidden_states: text tokens.
        temb: conditioning vector `[batch, dim]` of timestep, guidance and pooled text.
        image_rotary_emb: `(cos, sin)`, each `[seq, head_dim]`, text positions first.
        kernel: the attention kernel.
        attention: outputs to reuse, image and text; None computes them.
        image_prompts, scales: what the image tokens attend to besides, always computed; see `image_prompt_attention`.

    Returns:
        image tokens, text tokens (the host returns them the other way round), and the attention outputs used.

    """
    image, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.norm1(hidden_states, emb=temb)
    text, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = block.norm1_context(encoder_hidden_states, emb=temb)
    prompted = image_prompt_attention(block.attn, image, image_prompts, scales) if image_prompts else None
    if attention is None:
        attention = joint_attention(block.attn, image, text, image_rotary_emb=image_rotary_emb, kernel=kernel)
    image, text = attention

    hidden_states = hidden_states + gate_msa[:, None] * image
    image = block.norm2(hidden_states) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
    hidden_states = hidden_states + gate_mlp[:, None] * block.ff(image)
    if prompted is not None:
        hidden_states = hidden_states + prompted

    encoder_hidden_states = encoder_hidden_states + c_gate_msa[:, None] * text
    text = block.norm2_context(encoder_hidden_states) * (1 + c_scale_mlp[:, None]) + c_shift_mlp[:, None]
    encoder_hidden_states = encoder_hidden_states + c_gate_mlp[:, None] * block.ff_context(text)
    return hidden_states, _clip_float16(encoder_hidden_states), attention


@typed
def single_stream_block(
    block: HostModule,
    hidden_states: Features,
    *,
    temb: Tensor,
    image_rotary_emb: RotaryEmbedding,
    kernel: AttentionKernel,
    attention: Features | None = None,
) -> tuple[Features, Features]:
    """Run one single-stream block: attention and MLP in parallel over text and image tokens.

    Args:
        block: the host's `FluxSingleTransformerBlock`.
        hidden_states: tokens, text first; here the axis `img_seq` counts both.
        temb: conditioning vector `[batch, dim]`.
        image_rotary_emb: `(cos, sin)`, each `[seq, head_dim]`.
        kernel: the attention kernel.
        attention: the output to reuse; None computes it.

    Returns:
        tokens, and the attention output used.

    """
    normed, gate = block.norm(hidden_states, emb=temb)
    mlp = block.act_mlp(block.proj_mlp(normed))
    if attention is None:
        attention = self_attention(block.attn, normed, image_rotary_emb=image_rotary_emb, kernel=kernel)
    output = block.proj_out(torch.cat([attention, mlp], dim=2))
    return _clip_float16(hidden_states + gate[:, None] * output), attention


@typed
def modulate_double(block: HostModule, hidden_states: Features, encoder_hidden_states: TextFeatures, temb: Tensor) -> Tokens:
    """What a double-stream block's attention sees: modulated tokens, text first."""
    text = block.norm1_context(encoder_hidden_states, emb=temb)[0]
    return torch.cat([text, block.norm1(hidden_states, emb=temb)[0]], dim=1)


@typed
def modulate_single(block: HostModule, tokens: Tokens, temb: Tensor) -> Tokens:
    """What a single-stream block's attention sees: modulated tokens, text first."""
    return block.norm(tokens, emb=temb)[0]
