"""Groups of blocks that gate themselves, in plain Python around the host's own modules: one sample, no code of ours."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afcache.models.flux1.inputs import FluxInputs
from tests.support.by_hand import Host, change

Hook = Callable[[Any, Any, Any], Any]


def _cut(host: Host, together: Tensor) -> tuple[Tensor, Tensor]:
    """Image and text of tokens with the text first."""
    txt_seq = host.text.shape[1]
    return together[:, txt_seq:], together[:, :txt_seq]


def _run(host: Host, together: Tensor, start: int, stop: int, hooks: dict[int, Hook]) -> Tensor:
    """Blocks `start` to `stop` - 1 with hooks on what their attention modules return."""
    handles = [host.blocks[index].attn.register_forward_hook(hook) for index, hook in hooks.items()]
    image, text = host.run(_cut(host, together), start, stop)
    for handle in handles:
        handle.remove()
    return torch.cat([text, image], dim=1)


def _modulated(host: Host, together: Tensor, index: int) -> Tensor:
    block = host.blocks[index]
    if not hasattr(block, "norm1_context"):
        return block.norm(together, emb=host.temb)[0]
    image, text = _cut(host, together)
    return torch.cat([block.norm1_context(text, emb=host.temb)[0], block.norm1(image, emb=host.temb)[0]], dim=1)


def _attention_map(host: Host, modulated: Tensor, index: int) -> Tensor:
    """One head after the other, then their mean; without positions."""
    attn = host.blocks[index].attn
    image, text = _cut(host, modulated)
    is_double = attn.added_kv_proj_dim is not None
    streams = [(text, attn.add_q_proj, attn.norm_added_q, attn.add_k_proj, attn.norm_added_k)] if is_double else []
    streams.append((image if is_double else modulated, attn.to_q, attn.norm_q, attn.to_k, attn.norm_k))
    total = torch.zeros(modulated.shape[1], modulated.shape[1])
    for head in range(attn.heads):
        share = slice(head * attn.head_dim, (head + 1) * attn.head_dim)
        query = torch.cat([norm_q(to_q(x)[0, :, share]) for x, to_q, norm_q, _, _ in streams])
        key = torch.cat([norm_k(to_k(x)[0, :, share]) for x, _, _, to_k, norm_k in streams])
        weights = torch.exp(query @ key.T / math.sqrt(attn.head_dim))
        total += weights / weights.sum(dim=1, keepdim=True)
    return total / attn.heads


def _seen(host: Host, strategy: str, together: Tensor, first: int) -> Tensor:
    if strategy == "similarity":
        return together
    modulated = _modulated(host, together, first)
    return modulated if strategy == "difference" else _attention_map(host, modulated, first)


def _distance(strategy: str, seen: Tensor, kept: Tensor) -> float:
    if strategy == "difference":
        return change(seen, kept)
    if strategy == "attention":
        return float((seen - kept).abs().sum(dim=1).mean() / 2)
    x, y = seen.flatten().double(), kept.flatten().double()
    return 1 - float(x @ y / math.sqrt(float(x @ x) * float(y @ y)))


class Kept(NamedTuple):
    seen: Tensor
    residual: Tensor
    attention: list[Any]


class ByHand(NamedTuple):
    """Patterns and distances `[groups][steps]`, final latents."""

    patterns: list[str]
    distances: list[list[float]]
    latents: Tensor


@torch.no_grad()
def sample_groups_by_hand(
    transformer: Any, inputs: FluxInputs, sigmas: Tensor, strategy: str, *, edges: list[int], threshold: float, warmup: int
) -> ByHand:
    """Every group computes, or reuses while its statistic stays under the threshold."""
    latents, groups = inputs.hidden_states, len(edges) - 1
    kept: list[Kept | None] = [None] * groups
    patterns = [""] * groups
    distances: list[list[float]] = [[] for _ in range(groups)]
    for step in range(len(sigmas) - 1):
        host = Host(transformer, inputs, latents, float(sigmas[step]))
        together = torch.cat([host.text, host.image], dim=1)
        for group in range(groups):
            start, stop = edges[group], edges[group + 1]
            seen, known = _seen(host, strategy, together, start), kept[group]
            distance = math.nan if known is None else _distance(strategy, seen, known.seen)
            distances[group].append(distance)
            if known is not None and step >= warmup and distance < threshold:
                patterns[group] += "."
                if strategy == "attention":
                    hooks: dict[int, Hook] = {
                        start + k: (lambda module, args, output, old=old: old) for k, old in enumerate(known.attention)
                    }
                    together = _run(host, together, start, stop, hooks)
                else:
                    together = together + known.residual
                continue
            patterns[group] += "F"
            outputs: list[Any] = []
            after = _run(
                host,
                together,
                start,
                stop,
                dict.fromkeys(range(start, stop), lambda module, args, output, into=outputs: into.append(output)),
            )
            kept[group] = Kept(seen, after - together, outputs)
            together = after
        latents = latents + (sigmas[step + 1] - sigmas[step]) * host.head(_cut(host, together)[0])
    return ByHand(patterns, distances, latents)
