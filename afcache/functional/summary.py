"""Short summaries of token sequences."""

import torch

from afcache._typing import Summary, Tokens, typed
from afcache.initial import COARSE_TOKENS


@typed
def pool_tokens(tokens: Tokens, *, txt_seq: int) -> Summary:
    """Keep the text and average the image tokens over runs, to 64 at most.

    Args:
        tokens: text first.
        txt_seq: how many of them are text.

    Returns:
        `[batch, txt_seq + min(64, img_seq), dim]` in the dtype of `tokens`; runs differ by one token where 64 does not divide.

    """
    image = tokens[:, txt_seq:]
    length = image.shape[1]
    if length <= COARSE_TOKENS:
        return tokens
    run = torch.arange(length, device=tokens.device) * COARSE_TOKENS // length
    member = (run == torch.arange(COARSE_TOKENS, device=tokens.device)[:, None]).to(torch.float32)
    pooled = (member / member.sum(dim=1, keepdim=True)) @ image.to(torch.float32)
    return torch.cat([tokens[:, :txt_seq], pooled.to(tokens.dtype)], dim=1)
