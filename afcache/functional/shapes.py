"""Lengths of shards and of summaries, and values that are broadcast over latents of any rank."""

from torch import Tensor

# Image tokens of a group's summaries.
COARSE_TOKENS = 64


def shard_length(length: int, shards: int) -> int:
    """Tokens of each of several equal shards, padding included."""
    return -(-length // shards)


def coarse_length(img_seq: int, shards: int = 1) -> int:
    """Image tokens of a summary of a shard of `img_seq` tokens: 64 over all shards, at most one for each token."""
    return min(shard_length(COARSE_TOKENS, shards), img_seq)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Values `[batch]`, or one for all samples, 0-d, to be broadcast against a tensor `[batch, ...]`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
