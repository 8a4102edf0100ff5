"""The parts of a diffusion transformer, as functions of the module that owns the weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from afcache._typing import Features, Heads, HostModule, Tokens, Vector, typed
from afcache.functional.ranks.exchange import ALONE, Exchange

# (query, key, value) -> output, all `[batch, heads, seq, head_dim]`.
AttentionKernel = Callable[[Tensor, Tensor, Tensor], Tensor]


@typed
def scaled_dot_product_attention(query: Heads, key: Heads, value: Heads) -> Heads:
    """softmax(q k^T / sqrt(head_dim)) v with torch's own kernels: the default `AttentionKernel`."""
    return F.scaled_dot_product_attention(query, key, value)


class Embedded(NamedTuple):
    """What every step needs, cached or not. Text and positions matter to the blocks alone, so they are embedded there.

    Attributes:
        hidden_states: image tokens `[batch, img_seq, dim]`.
        temb: conditioning vector `[batch, dim]`.

    """

    hidden_states: Features
    temb: Vector


class Part(NamedTuple):
    """Blocks `start` to `stop` - 1 of the stack, counted over both kinds; static."""

    start: int
    stop: int


class Sizes(NamedTuple):
    """What is fixed of a model; static.

    Attributes:
        num_blocks: that one full forward evaluates.
        dim: width of the tokens that the blocks see.
        heads: attention heads; each is dim / heads wide.
        channels: width of a velocity's tokens.

    """

    num_blocks: int
    dim: int
    heads: int
    channels: int


class Parts(NamedTuple):
    """How to run the stack part by part. Tokens are text and image together, text first.

    Attributes:
        prefix_length: `(inputs) -> int`: tokens that the blocks see before the image's.
        open: `(transformer, inputs, embedded) -> tokens [batch, seq, dim]` before the first block.
        run: `(model, inputs, tokens, temb, part, attention) -> tokens, [attention output of each block]`; `attention` holds
            outputs to reuse, `[blocks, batch, seq, dim]`, or None.
        observe: `(transformer, hidden_states, temb) -> [batch, img_seq, dim]`: image tokens as the first block's attention
            would see them.
        modulate: `(transformer, tokens, temb, index, txt_seq) -> tokens` as the attention of block `index` would see them.
        attention_map: `(transformer, modulated, index, txt_seq) -> [batch, seq, seq]`: its attention map, averaged over heads.

    """

    prefix_length: Callable[[Any], int]
    open: Callable[[HostModule, Any, Embedded], Tokens]
    run: Callable[[Any, Any, Tokens, Tensor, Part, Tensor | None], tuple[Tokens, list[Tokens]]]
    observe: Callable[[HostModule, Features, Tensor], Features]
    modulate: Callable[[HostModule, Tokens, Tensor, int, int], Tokens]
    attention_map: Callable[[HostModule, Tokens, int, int], Tensor]


class Lengths(NamedTuple):
    """Tokens of a sequence.

    Attributes:
        txt_seq: text tokens.
        img_seq: image tokens.

    """

    txt_seq: int
    img_seq: int


class TokenAxes(NamedTuple):
    """Where tokens are in a model's inputs, for ranks that share them.

    Attributes:
        lengths: `(inputs) -> Lengths`.
        split: `(inputs, take) -> inputs` with `take(tensor, axis)` in place of everything that has an axis of tokens.

    """

    lengths: Callable[[Any], Lengths]
    split: Callable[[Any, Callable[[Tensor, int], Tensor]], Any]


class Architecture(NamedTuple):
    """What a cached step asks of a kind of model.

    Attributes:
        sizes: `(transformer) -> Sizes`.
        embed: `(transformer, inputs) -> Embedded`.
        stack: `(model, inputs, embedded) -> hidden_states [batch, img_seq, dim]`.
        head: `(transformer, hidden_states, temb) -> velocity [batch, img_seq, channels]`.
        place: `(inputs, latents, sigma) -> inputs` of the same sample at another point of its trajectory.
        latents: `(inputs) -> x`: what the scheduler steps, of the velocity's shape.
        forward: `(model, inputs of every branch of a call) -> their velocities`, where these are made otherwise than by
            embedding, stack and head, one branch after the other; None: by them.
        split: `(inputs, count) -> inputs of each guidance branch`, where one call may hold several of them; None: it holds one.
        parts: asked for by gates, by groups, and by blocks that run at every step; None where a model has none.
        axes: asked for by ranks that share a sequence; None where a model cannot be shared.

    """

    sizes: Callable[[HostModule], Sizes]
    embed: Callable[[HostModule, Any], Embedded]
    stack: Callable[[Any, Any, Embedded], Tensor]
    head: Callable[[HostModule, Tensor, Tensor], Tensor]
    place: Callable[[Any, Tensor, Tensor], Any]
    latents: Callable[[Any], Tensor]
    forward: Callable[[Any, tuple[Any, ...]], tuple[Tensor, ...]] | None = None
    split: Callable[[Any, int], tuple[Any, ...]] | None = None
    parts: Parts | None = None
    axes: TokenAxes | None = None


class Model(NamedTuple):
    """A transformer, and how a step runs on it; all but the weights' values is static.

    Attributes:
        transformer: owner of the weights.
        architecture: its parts.
        kernel: the attention kernel.
        sizes: what is fixed of it.
        exchange: what ranks tell each other when they take a step together.

    """

    transformer: HostModule
    architecture: Architecture
    kernel: AttentionKernel
    sizes: Sizes
    exchange: Exchange = ALONE


def model_of(transformer: HostModule, architecture: Architecture, kernel: AttentionKernel) -> Model:
    """A model of one process."""
    return Model(transformer, architecture, kernel, architecture.sizes(transformer))


def parts_of(model: Model) -> Parts:
    """How to run the stack part by part; the settings were checked against it."""
    assert model.architecture.parts is not None
    return model.architecture.parts
