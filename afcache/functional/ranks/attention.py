"""Attention over a sequence whose tokens lie on several ranks: Ulysses, ring, and both.

xfuser's own long-context attention carries `torch.compiler.disable`, so the mathematics is written again here, over xfuser's
groups, with collectives that trace.

Reference:
    Ulysses: Jacobs et al., 2023, DeepSpeed Ulysses, arXiv 2309.14509. Ring: Liu et al., 2023, Ring Attention, arXiv 2310.01889.
    Both together: Fang, Zhao, 2024, USP, arXiv 2405.07719.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afcache.functional.model import AttentionKernel, Lengths
from afcache.functional.ranks.collectives import Ranks, all_to_all, shift
from afcache.functional.shapes import shard_length


class SequenceRanks(NamedTuple):
    """The ranks that share a sequence: rank = ring.rank * ulysses.size + ulysses.rank. Static.

    Attributes:
        whole: all of them, in the order of their shards.
        ulysses: those that hold neighbouring shards, and exchange heads.
        ring: those that pass keys and values on.

    """

    whole: Ranks = Ranks()
    ulysses: Ranks = Ranks()
    ring: Ranks = Ranks()


def sequence_attention(
    query: Tensor, key: Tensor, value: Tensor, *, ranks: SequenceRanks, lengths: Lengths, kernel: AttentionKernel
) -> Tensor:
    """An `AttentionKernel` over sharded tokens.

    Args:
        query, key, value: `[batch, heads, share of text + share of image, head_dim]`, positions applied.
        ranks: who shares the sequence.
        lengths: of the whole sequence; padding takes no part.
        kernel: for whole sequences; rings, which need more than the output, do without it.

    Returns:
        `[batch, heads, share of text + share of image, head_dim]`.
    Cost:
        two all-to-all (Ulysses) and ring.size - 1 hops; each moves the shard's size a few times.

    """
    batch, heads, _, head_dim = query.shape
    share = Lengths(*(shard_length(length, ranks.whole.size) for length in lengths))
    row = Lengths(*(length * ranks.ulysses.size for length in share))
    projections = _to_heads(torch.stack([query, key, value]), ranks.ulysses, share)
    if ranks.ring.size == 1:
        output = _widen(kernel(*_cut(projections, row, lengths).unbind()), row, lengths)
    else:
        output = _ring(projections, ranks.ring, row, lengths)
    by_rank = _by_rank(output, ranks.ulysses.size, share)
    received = all_to_all(by_rank, ranks.ulysses)
    return received.transpose(0, 1).reshape(batch, heads, sum(share), head_dim)


def _to_heads(x: Tensor, ulysses: Ranks, share: Lengths) -> Tensor:
    """`[3, batch, heads, share, head_dim] -> [3, batch, heads / ulysses, row, head_dim]`, text first."""
    by_heads = torch.stack(x.chunk(ulysses.size, dim=2))
    shards = all_to_all(by_heads, ulysses)
    text, image = shards.split(list(share), dim=-2)
    return torch.cat([_line_up(text), _line_up(image)], dim=-2)


def _line_up(shards: Tensor) -> Tensor:
    """`[ranks, ..., share, head_dim] -> [..., ranks * share, head_dim]`."""
    return shards.movedim(0, -3).flatten(-3, -2)


def _by_rank(x: Tensor, count: int, share: Lengths) -> Tensor:
    """`[batch, heads, row, head_dim] -> [ranks, batch, heads, share, head_dim]`: the inverse."""
    text, image = x.split([share.txt_seq * count, share.img_seq * count], dim=-2)
    return torch.cat([part.unflatten(-2, (count, -1)).movedim(-3, 0) for part in (text, image)], dim=-2)


def _cut(x: Tensor, row: Lengths, lengths: Lengths) -> Tensor:
    """Take the padding out: it lies at the ends of text and image."""
    if row == lengths:
        return x
    text, image = x.split(list(row), dim=-2)
    return torch.cat([text[..., : lengths.txt_seq, :], image[..., : lengths.img_seq, :]], dim=-2)


def _widen(x: Tensor, row: Lengths, lengths: Lengths) -> Tensor:
    """Put zeros where `_cut` took padding out."""
    if row == lengths:
        return x
    text, image = x.split(list(lengths), dim=-2)
    widened = [F.pad(part, (0, 0, 0, wide - part.shape[-2])) for part, wide in zip((text, image), row, strict=True)]
    return torch.cat(widened, dim=-2)


def _ring(projections: Tensor, ring: Ranks, row: Lengths, lengths: Lengths) -> Tensor:
    """Attend to the own keys and values, then to those that come round the ring; softmaxes are merged as they come."""
    query, keys_values = projections[0], projections[1:]
    output, weight = attend(query, *keys_values.unbind(), bias=_padding_bias(query, ring.rank, row, lengths))
    for hop in range(1, ring.size):
        keys_values = shift(keys_values, ring)
        bias = _padding_bias(query, (ring.rank + hop) % ring.size, row, lengths)
        output, weight = merge(output, weight, *attend(query, *keys_values.unbind(), bias=bias))
    return output.to(query.dtype)


def _padding_bias(query: Tensor, source: int, row: Lengths, lengths: Lengths) -> Tensor | None:
    """What to add to the scores of a row's keys so that padding weighs exactly nothing: `[1, 1, 1, row]`, or None.

    It is large and finite: a row may be all padding, and a softmax over infinities is none.
    """
    missing = [(source + 1) * wide - length for wide, length in zip(row, lengths, strict=True)]
    if max(missing) <= 0:
        return None
    places = [torch.arange(wide, device=query.device) + source * wide for wide in row]
    real = torch.cat([place < length for place, length in zip(places, lengths, strict=True)])
    nothing = torch.finfo(query.dtype).min / 2
    return torch.where(real, 0.0, nothing).to(query.dtype)[None, None, None]


def attend(query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(head_dim) + bias) v, and the logarithm of the softmax's denominator.

    Args:
        query, key, value: `[batch, heads, seq, head_dim]`; keys may be more or fewer than queries.
        bias: `[1, 1, 1, keys]`, or None.

    Returns:
        output `[batch, heads, queries, head_dim]`; float32 logarithms `[batch, heads, queries]`.

    """
    queries = query.shape[-2]
    if bias is not None:
        bias = bias.expand(query.shape[0], query.shape[1], queries, key.shape[-2])
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias)
    if query.device.type == "cuda" and bias is None and query.dtype != torch.float32:
        output, weight = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[:2]
        return output, weight
    if query.device.type == "cuda":
        output, weight = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[:2]
        # Its logarithms are padded to multiples of 32 queries.
        return output, weight[..., :queries]
    scores = query.to(torch.float32) @ key.to(torch.float32).mT / query.shape[-1] ** 0.5
    scores = scores if bias is None else scores + bias
    return (scores.softmax(dim=-1) @ value.to(torch.float32)).to(query.dtype), scores.logsumexp(dim=-1)


def merge(output: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys, from attention over each; stable, float32.

    Args:
        output, other: attention outputs `[batch, heads, queries, head_dim]`.
        weight, other_weight: logarithms of their softmax denominators, `[batch, heads, queries]`.

    """
    total = torch.logaddexp(weight, other_weight)
    share, other_share = (w.sub(total).exp()[..., None] for w in (weight, other_weight))
    return output.to(torch.float32) * share + other.to(torch.float32) * other_share, total
