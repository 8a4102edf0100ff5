"""A stack in three sections: first and last blocks, which run at every step, and between them those that are cached."""

from typing import Any

from torch import Tensor

from afcache._typing import Tokens, typed
from afcache.functional.model import Embedded, Model, Part, parts_of
from afcache.settings.config import CacheConfig


@typed
def run_first_blocks(model: Model, inputs: Any, embedded: Embedded, *, config: CacheConfig) -> Tokens:
    """What the cached blocks start from: image tokens where all blocks are cached, else text and image tokens.

    Args:
        model: the transformer.
        inputs: what the architecture's `embed` takes.
        embedded: image tokens and conditioning.
        config: settings; static.

    """
    if not config.runs_sections:
        return embedded.hidden_states
    tokens = parts_of(model).open(model.transformer, inputs, embedded)
    part = Part(0, config.first_blocks)
    return _run(model, inputs, tokens, embedded.temb, part) if config.first_blocks else tokens


@typed
def run_cached_blocks(model: Model, inputs: Any, embedded: Embedded, start: Tokens, *, config: CacheConfig) -> Tokens:
    """Run the cached blocks on what `run_first_blocks` returned."""
    if not config.runs_sections:
        return model.architecture.stack(model, inputs, embedded)
    part = Part(config.first_blocks, model.sizes.num_blocks - config.last_blocks)
    return _run(model, inputs, start, embedded.temb, part)


@typed
def run_last_blocks(model: Model, inputs: Any, embedded: Embedded, tokens: Tokens, *, config: CacheConfig) -> Tensor:
    """Run the last blocks on what the cached ones returned; image tokens `[batch, img_seq, dim]`."""
    if not config.runs_sections:
        return tokens
    if config.last_blocks:
        part = Part(model.sizes.num_blocks - config.last_blocks, model.sizes.num_blocks)
        tokens = _run(model, inputs, tokens, embedded.temb, part)
    return tokens[:, tokens.shape[1] - embedded.hidden_states.shape[1] :]


def _run(model: Model, inputs: Any, tokens: Tensor, temb: Tensor, part: Part) -> Tensor:
    return parts_of(model).run(model, inputs, tokens, temb, part, None)[0]
