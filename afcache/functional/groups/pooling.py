"""Short summaries of token sequences."""

import torch

from afcache._typing import Summary, Tokens, typed
from afcache.functional.shapes import coarse_length


@typed
def pool_tokens(tokens: Tokens, *, txt_seq: int, shards: int = 1) -> Summary:
    """Keep the text and average the image tokens over runs, to 64 at most.

    Args:
        tokens: text first.
        txt_seq: how many of them are text.
        shards: how many ranks share the image tokens, and so the 64 runs.

    Returns:
        `[batch, txt_seq + min(64, img_seq), dim]` in the dtype of `tokens`; runs differ by one token where 64 does not
        divide. With shards, what this rank adds to that.

    """
    image = tokens[:, txt_seq:]
    length = image.shape[1]
    runs = coarse_length(length, shards)
    if length == runs:
        return tokens
    run = torch.arange(length, device=tokens.device) * runs // length
    member = (run == torch.arange(runs, device=tokens.device)[:, None]).to(torch.float32)
    pooled = (member / member.sum(dim=1, keepdim=True)) @ image.to(torch.float32)
    return torch.cat([tokens[:, :txt_seq], pooled.to(tokens.dtype)], dim=1)
