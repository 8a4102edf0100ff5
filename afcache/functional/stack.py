"""The block stack as one function from embedded tokens to image tokens."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from afcache._typing import Features, HostModule, TextFeatures, typed
from afcache.functional.attention import AttentionKernel, RotaryEmbedding
from afcache.functional.blocks import double_stream_block, single_stream_block


class Embedded(NamedTuple):
    """What every step needs, cached or not. Text and positions matter to the blocks alone, so they are embedded there.

    Attributes:
        hidden_states: image tokens `[batch, img_seq, dim]`.
        temb: conditioning vector `[batch, dim]`.

    """

    hidden_states: Tensor
    temb: Tensor


@typed
def run_stack(
    double_blocks: Iterable[HostModule],
    single_blocks: Iterable[HostModule],
    embedded: Embedded,
    encoder_hidden_states: TextFeatures,
    *,
    image_rotary_emb: RotaryEmbedding,
    kernel: AttentionKernel,
) -> Features:
    """Run all blocks and return the image tokens.

    Args:
        double_blocks: the host's double-stream blocks, in order.
        single_blocks: the host's single-stream blocks, in order.
        embedded: image tokens and conditioning.
        encoder_hidden_states: embedded text tokens.
        image_rotary_emb: `(cos, sin)`, each `[txt_seq + img_seq, head_dim]`, float32.
        kernel: the attention kernel.

    """
    hidden_states, temb = embedded
    for block in double_blocks:
        hidden_states, encoder_hidden_states = double_stream_block(
            block, hidden_states, encoder_hidden_states, temb=temb, image_rotary_emb=image_rotary_emb, kernel=kernel
        )
    txt_seq = encoder_hidden_states.shape[1]
    joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    for block in single_blocks:
        joint = single_stream_block(block, joint, temb=temb, image_rotary_emb=image_rotary_emb, kernel=kernel)
    return joint[:, txt_seq:]
