"""Joint attention over text and image tokens; the kernel is an argument.

Reshapes that every block repeats are torch's own here and in rope.py: Dynamo steps through einops' Python, which takes longer
than tracing the rest of the block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from afcache._typing import AttentionMap, Features, HostModule, TextFeatures, typed
from afcache.functional.model import AttentionKernel
from afcache.models.flux1.rope import apply_rotary_emb

RotaryEmbedding = tuple[Tensor, Tensor]


def _split_heads(attn: HostModule, x: Tensor) -> Tensor:
    """`[batch, seq, heads * head_dim] -> [batch, heads, seq, head_dim]`."""
    return x.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)


def _project(attn: HostModule, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the stream that the block owns, normalised per head."""
    if attn.fused_projections:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    query, key, value = (_split_heads(attn, x) for x in (query, key, value))
    return attn.norm_q(query), attn.norm_k(key), value


def _project_added(attn: HostModule, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the text stream of a double-stream block."""
    if attn.fused_projections:
        query, key, value = attn.to_added_qkv(encoder_hidden_states).chunk(3, dim=-1)
    else:
        query = attn.add_q_proj(encoder_hidden_states)
        key = attn.add_k_proj(encoder_hidden_states)
        value = attn.add_v_proj(encoder_hidden_states)
    query, key, value = (_split_heads(attn, x) for x in (query, key, value))
    return attn.norm_added_q(query), attn.norm_added_k(key), value


def _attend(query: Tensor, key: Tensor, value: Tensor, image_rotary_emb: RotaryEmbedding, kernel: AttentionKernel) -> Tensor:
    cos, sin = image_rotary_emb
    output = kernel(apply_rotary_emb(query, cos, sin), apply_rotary_emb(key, cos, sin), value)
    return output.transpose(1, 2).flatten(2).to(query.dtype)


@typed
def joint_attention(
    attn: HostModule,
    hidden_states: Features,
    encoder_hidden_states: TextFeatures,
    *,
    image_rotary_emb: RotaryEmbedding,
    kernel: AttentionKernel,
) -> tuple[Features, TextFeatures]:
    """Attend over text and image tokens together, each stream with its own projections.

    Args:
        attn: the host's attention module; its submodules are called, its forward is not.
        hidden_states: modulated image tokens.
        encoder_hidden_states: modulated text tokens.
        image_rotary_emb: `(cos, sin)`, each `[seq, head_dim]`, text positions first.
        kernel: maps query, key, value to the attention output.

    Returns:
        the image stream's and the text stream's output projections.
    Reference:
        Esser et al., 2024, arXiv 2403.03206, section 4 (MM-DiT).

    """
    txt_seq = encoder_hidden_states.shape[1]
    image = _project(attn, hidden_states)
    text = _project_added(attn, encoder_hidden_states)
    query, key, value = (torch.cat([t, i], dim=2) for t, i in zip(text, image, strict=True))
    output = _attend(query, key, value, image_rotary_emb, kernel)
    image_output = attn.to_out[1](attn.to_out[0](output[:, txt_seq:].contiguous()))
    return image_output, attn.to_add_out(output[:, :txt_seq].contiguous())


@typed
def image_prompt_attention(
    attn: HostModule, hidden_states: Features, image_prompts: tuple[Tensor, ...], scales: Tensor | None = None
) -> Features:
    """What an IP-Adapter adds to the image tokens: they attend to each image prompt, without positions.

    sum_i scale_i softmax(q k_i^T / sqrt(head_dim)) v_i

    Args:
        attn: the host's attention module; its processor owns the adapters' projections and scales.
        hidden_states: modulated image tokens.
        image_prompts: one `[batch, prompt_seq, dim]` for each adapter.
        scales: float32 `[adapters]`; None takes the processor's numbers.

    Reference:
        Ye et al., 2023, IP-Adapter, arXiv 2308.06721, section 3.2.

    """
    adapter = attn.processor
    query, added = _project(attn, hidden_states)[0], torch.zeros_like(hidden_states)
    heeded = adapter.scale if scales is None else scales.unbind()
    for prompt, scale, to_key, to_value in zip(image_prompts, heeded, adapter.to_k_ip, adapter.to_v_ip, strict=True):
        key, value = _split_heads(attn, to_key(prompt)), _split_heads(attn, to_value(prompt))
        output = F.scaled_dot_product_attention(query, key, value)
        # In float32 a scale counts the same, number or tensor.
        added = added + (scale * output.transpose(1, 2).flatten(2).to(torch.float32)).to(query.dtype)
    return added


@typed
def self_attention(
    attn: HostModule, hidden_states: Features, *, image_rotary_emb: RotaryEmbedding, kernel: AttentionKernel
) -> Features:
    """Attend over the concatenated sequence of a single-stream block, without output projection.

    Args:
        attn: the host's attention module.
        hidden_states: modulated tokens, text first; here the axis `img_seq` counts both.
        image_rotary_emb: `(cos, sin)`, each `[seq, head_dim]`.
        kernel: maps query, key, value to the attention output.

    """
    return _attend(*_project(attn, hidden_states), image_rotary_emb, kernel)


@typed
def mean_attention_map(attn: HostModule, hidden_states: Features, encoder_hidden_states: TextFeatures | None) -> AttentionMap:
    """softmax(q k^T / sqrt(head_dim)), averaged over heads: a summary of where a block attends.

    Positions are left out: they are the same at every step, and pooled tokens have none.

    Args:
        attn: the host's attention module.
        hidden_states: modulated image tokens of a double-stream block, all tokens of a single-stream block.
        encoder_hidden_states: modulated text tokens of a double-stream block, else None.

    Returns:
        float32 `[batch, seq, seq]`, text first.

    """
    query, key, _ = _project(attn, hidden_states)
    if encoder_hidden_states is not None:
        text_query, text_key, _ = _project_added(attn, encoder_hidden_states)
        query, key = torch.cat([text_query, query], dim=2), torch.cat([text_key, key], dim=2)
    scores = query.to(torch.float32) @ key.to(torch.float32).mT / attn.head_dim**0.5
    return scores.softmax(dim=-1).mean(dim=1)
