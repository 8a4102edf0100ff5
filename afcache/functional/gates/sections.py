"""A stack in three sections: blocks that run at every step, blocks that are cached, blocks that run at every step."""

from typing import Any

from torch import Tensor

from afcache._typing import HostModule, Tokens, typed
from afcache.functional.model import Architecture, AttentionKernel, Embedded, Part
from afcache.settings.config import CacheConfig


def is_whole(config: CacheConfig) -> bool:
    """Whether all blocks are cached, so that text tokens matter to them alone."""
    return not (config.first_blocks or config.last_blocks)


@typed
def enter(
    transformer: HostModule,
    inputs: Any,
    embedded: Embedded,
    *,
    architecture: Architecture,
    kernel: AttentionKernel,
    config: CacheConfig,
) -> Tokens:
    """Run the first blocks.

    Args:
        transformer: owner of the weights.
        inputs: what `architecture.embed` takes.
        embedded: image tokens and conditioning.
        architecture: the model's parts.
        kernel: the attention kernel.
        config: settings; static.

    Returns:
        what the cached blocks start from: image tokens where all blocks are cached, else text and image tokens.

    """
    if is_whole(config):
        return embedded.hidden_states
    assert architecture.parts is not None
    tokens = architecture.parts.open(transformer, inputs, embedded)
    if not config.first_blocks:
        return tokens
    part = Part(0, config.first_blocks)
    return architecture.parts.run(transformer, inputs, tokens, embedded.temb, kernel, part, None)[0]


@typed
def cross(
    transformer: HostModule,
    inputs: Any,
    embedded: Embedded,
    start: Tokens,
    *,
    architecture: Architecture,
    kernel: AttentionKernel,
    config: CacheConfig,
) -> Tokens:
    """Run the cached blocks on what `enter` returned."""
    if is_whole(config):
        return architecture.stack(transformer, inputs, embedded, kernel)
    assert architecture.parts is not None
    part = Part(config.first_blocks, architecture.parts.num_blocks(transformer) - config.last_blocks)
    return architecture.parts.run(transformer, inputs, start, embedded.temb, kernel, part, None)[0]


@typed
def leave(
    transformer: HostModule,
    inputs: Any,
    embedded: Embedded,
    tokens: Tokens,
    *,
    architecture: Architecture,
    kernel: AttentionKernel,
    config: CacheConfig,
) -> Tensor:
    """Run the last blocks on what the cached ones returned; image tokens `[batch, img_seq, dim]`."""
    if is_whole(config):
        return tokens
    assert architecture.parts is not None
    if config.last_blocks:
        num_blocks = architecture.parts.num_blocks(transformer)
        part = Part(num_blocks - config.last_blocks, num_blocks)
        tokens = architecture.parts.run(transformer, inputs, tokens, embedded.temb, kernel, part, None)[0]
    return tokens[:, tokens.shape[1] - embedded.hidden_states.shape[1] :]
