"""A sequence cut into equal shards, one for each rank; what is missing in the last ones is padding, and padding is zero."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afcache._typing import HostModule
from afcache.functional.model import Architecture, Embedded, Lengths, Model, Part
from afcache.functional.ranks.collectives import Ranks
from afcache.functional.shapes import shard_length


def take_shard(x: Tensor, ranks: Ranks, *, dim: int) -> Tensor:
    """The share of an axis that is this rank's; tokens that are missing at the end are zeros. A fresh tensor."""
    length = x.shape[dim]
    share = shard_length(length, ranks.size)
    start = min(ranks.rank * share, length)
    mine = x.narrow(dim, start, min(share, length - start))
    missing = share - mine.shape[dim]
    if not missing:
        return mine.clone(memory_format=torch.contiguous_format)
    widths = [0, 0] * (x.ndim - 1 - dim) + [0, missing]
    return F.pad(mine, widths)


def join_shards(shards: Tensor, length: int) -> Tensor:
    """`[ranks, batch, share, ...] -> [batch, length, ...]`: the inverse of `take_shard` along axis 1, without padding."""
    return shards.transpose(0, 1).flatten(1, 2)[:, :length]


def is_real(length: int, ranks: Ranks, device: torch.device) -> Tensor:
    """Which tokens of this rank's share are none of the padding; bool `[share]`."""
    share = shard_length(length, ranks.size)
    return torch.arange(share, device=device) + ranks.rank * share < length


def hide_padding(architecture: Architecture, lengths: Lengths, ranks: Ranks, device: torch.device) -> Architecture:
    """The same model with zeros wherever padding could be seen, so that sums over tokens are those of real ones.

    Args:
        architecture: of the whole model.
        lengths: of the whole sequence.
        ranks: the ranks that share it.
        device: where masks are made.

    """
    if not (lengths.txt_seq % ranks.size or lengths.img_seq % ranks.size):
        return architecture
    image = is_real(lengths.img_seq, ranks, device)[:, None]
    joint = torch.cat([is_real(lengths.txt_seq, ranks, device)[:, None], image])

    def hide(tokens: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, tokens, torch.zeros_like(tokens))

    def embed(transformer: HostModule, inputs: Any) -> Embedded:
        embedded = architecture.embed(transformer, inputs)
        return embedded._replace(hidden_states=hide(embedded.hidden_states, image))

    def stack(model: Model, inputs: Any, embedded: Embedded) -> Tensor:
        return hide(architecture.stack(model, inputs, embedded), image)

    def head(transformer: HostModule, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return hide(architecture.head(transformer, hidden_states, temb), image)

    hidden = architecture._replace(embed=embed, stack=stack, head=head)
    parts = architecture.parts
    if parts is None:
        return hidden

    def open_tokens(transformer: HostModule, inputs: Any, embedded: Embedded) -> Tensor:
        return hide(parts.open(transformer, inputs, embedded), joint)

    def run(
        model: Model, inputs: Any, tokens: Tensor, temb: Tensor, part: Part, attention: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        after, outputs = parts.run(model, inputs, tokens, temb, part, attention)
        return hide(after, joint), [hide(output, joint) for output in outputs]

    def observe(transformer: HostModule, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return hide(parts.observe(transformer, hidden_states, temb), image)

    def modulate(transformer: HostModule, tokens: Tensor, temb: Tensor, index: int, txt_seq: int) -> Tensor:
        return hide(parts.modulate(transformer, tokens, temb, index, txt_seq), joint)

    return hidden._replace(parts=parts._replace(open=open_tokens, run=run, observe=observe, modulate=modulate))
