"""What random models of other families have in common: their sizes, and prompts of nothing but embeddings."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

TEXT_TOKENS = 64


class Size(NamedTuple):
    """A model of random weights: heads and their width, blocks, image tokens (of all frames)."""

    heads: int
    head_dim: int
    layers: int
    tokens: int


def two_prompts(pipe: Any, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A prompt and a negative one, both as long, `[1, TEXT_TOKENS, width]`."""
    shape = (1, TEXT_TOKENS, width)
    prompt, negative = (torch.randn(shape, generator=generator).to(pipe.device, pipe.dtype) for _ in range(2))
    return prompt, negative
