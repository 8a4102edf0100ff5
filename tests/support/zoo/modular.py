"""How tiny modular pipelines are put together: blocks of diffusers without text encoder and decoder, and components."""

from typing import Any

import torch

OUTSIDE = ("prompt_upsampler", "prompt_enhancer", "before_encode", "text_encoder", "semantic_generator", "duration", "decode")


def assemble(blocks: Any, outside: tuple[str, ...] = OUTSIDE, **components: Any) -> Any:
    """A modular pipeline that takes a prompt's embeddings and gives latents, as when a user encodes and decodes apart."""
    inner = blocks() if isinstance(blocks, type) else blocks
    for name in outside:
        inner.sub_blocks.pop(name, None)
    pipe = inner.init_pipeline()
    pipe.update_components(**components)
    _hush(pipe._blocks)
    return pipe


def _hush(blocks: Any) -> None:
    """No progress bars: a modular pipeline's own method reaches only its outermost blocks."""
    for block in getattr(blocks, "sub_blocks", {}).values():
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
        _hush(block)


def take(pipe: Any, *names: str) -> dict[str, Any]:
    """Components of another pipeline."""
    return {name: getattr(pipe, name) for name in names}


def as_given(result: Any) -> torch.Tensor:
    """The latents that a modular pipeline was asked for with `output`, in one row if they are several."""
    if isinstance(result, dict):
        return torch.cat([value.flatten() for value in result.values()])
    return result
