"""The block stack, whole or in parts, as functions of tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from afcache._typing import Features, HostModule, TextFeatures, Tokens, typed
from afcache.functional.model import AttentionKernel, Embedded
from afcache.models.flux1.attention import RotaryEmbedding
from afcache.models.flux1.blocks import double_stream_block, single_stream_block


class Blocks(NamedTuple):
    """Consecutive blocks of the host.

    Attributes:
        double: double-stream blocks, in order.
        single: single-stream blocks after them.

    """

    double: Sequence[HostModule]
    single: Sequence[HostModule]


class Control(NamedTuple):
    """What steers the blocks besides the text.

    Attributes:
        double, single: what is added to the image tokens after each block, `[batch, img_seq, dim]`: a ControlNet's residuals.
            As long as the blocks, or empty.
        image_prompts: what image tokens of double-stream blocks attend to besides, one `[batch, prompt_seq, dim]` for each
            IP-Adapter.
        scales: how much each double-stream block heeds every image prompt, `[adapters]`; None: as its own adapters say.

    """

    double: Sequence[Features] = ()
    single: Sequence[Features] = ()
    image_prompts: tuple[Float[Tensor, "batch prompt_seq dim"], ...] = ()
    scales: Sequence[Float[Tensor, " adapters"]] | None = None


NO_CONTROL = Control()


@typed
def run_stack(
    blocks: Blocks,
    embedded: Embedded,
    encoder_hidden_states: TextFeatures,
    *,
    image_rotary_emb: RotaryEmbedding,
    kernel: AttentionKernel,
    control: Control = NO_CONTROL,
) -> Features:
    """Run all blocks and return the image tokens.

    Args:
        blocks: all of the host's.
        embedded: image tokens and conditioning.
        encoder_hidden_states: embedded text tokens.
        image_rotary_emb: `(cos, sin)`, each `[txt_seq + img_seq, head_dim]`, float32.
        kernel: the attention kernel.
        control: what steers the blocks besides.

    """
    hidden_states, temb = embedded
    for index, block in enumerate(blocks.double):
        hidden_states, encoder_hidden_states, _ = double_stream_block(
            block,
            hidden_states,
            encoder_hidden_states,
            temb=temb,
            image_rotary_emb=image_rotary_emb,
            kernel=kernel,
            image_prompts=control.image_prompts,
            scales=None if control.scales is None else control.scales[index],
        )
        if control.double:
            hidden_states = hidden_states + control.double[index]
    txt_seq = encoder_hidden_states.shape[1]
    tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    for index, block in enumerate(blocks.single):
        tokens, _ = single_stream_block(block, tokens, temb=temb, image_rotary_emb=image_rotary_emb, kernel=kernel)
        if control.single:
            tokens = _add_to_image(tokens, control.single[index])
    return tokens[:, txt_seq:]


def _add_to_image(tokens: Tensor, residual: Tensor) -> Tensor:
    """Image tokens come last."""
    others = tokens.shape[1] - residual.shape[1]
    return torch.cat([tokens[:, :others], tokens[:, others:] + residual], dim=1)


@typed
def run_part(
    blocks: Blocks,
    tokens: Tokens,
    *,
    txt_seq: int,
    temb: Tensor,
    image_rotary_emb: RotaryEmbedding,
    kernel: AttentionKernel,
    attention: Tensor | None = None,
    control: Control = NO_CONTROL,
) -> tuple[Tokens, list[Tokens]]:
    """Run some of the blocks on text and image tokens.

    Args:
        blocks: those to run.
        tokens: text first.
        txt_seq: how many of them are text.
        temb: conditioning vector `[batch, dim]`.
        image_rotary_emb: `(cos, sin)`, each `[seq, head_dim]`, float32.
        kernel: the attention kernel.
        attention: outputs to reuse, `[blocks, batch, seq, dim]`, text first; None computes them.
        control: what steers these blocks besides.

    Returns:
        the tokens after the blocks, and each block's attention output, text first.

    """
    outputs = []
    if blocks.double:
        encoder_hidden_states, hidden_states = tokens[:, :txt_seq], tokens[:, txt_seq:]
        for index, block in enumerate(blocks.double):
            reused = None if attention is None else (attention[index, :, txt_seq:], attention[index, :, :txt_seq])
            hidden_states, encoder_hidden_states, (image, text) = double_stream_block(
                block,
                hidden_states,
                encoder_hidden_states,
                temb=temb,
                image_rotary_emb=image_rotary_emb,
                kernel=kernel,
                attention=reused,
                image_prompts=control.image_prompts,
                scales=None if control.scales is None else control.scales[index],
            )
            outputs.append(torch.cat([text, image], dim=1))
            if control.double:
                hidden_states = hidden_states + control.double[index]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    for index, block in enumerate(blocks.single, start=len(blocks.double)):
        tokens, output = single_stream_block(
            block,
            tokens,
            temb=temb,
            image_rotary_emb=image_rotary_emb,
            kernel=kernel,
            attention=None if attention is None else attention[index],
        )
        outputs.append(output)
        if control.single:
            tokens = _add_to_image(tokens, control.single[index - len(blocks.double)])
    return tokens, outputs
