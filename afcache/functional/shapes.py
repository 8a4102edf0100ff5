"""Lengths of shards and of summaries."""

# Image tokens of a group's summaries.
COARSE_TOKENS = 64


def shard_length(length: int, shards: int) -> int:
    """Tokens of each of several equal shards, padding included."""
    return -(-length // shards)


def coarse_length(img_seq: int, shards: int = 1) -> int:
    """Image tokens of a summary of a shard of `img_seq` tokens: 64 over all shards, at most one for each token."""
    return min(shard_length(COARSE_TOKENS, shards), img_seq)
