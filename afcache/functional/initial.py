"""Empty states of the right shapes, and what checks them."""

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from afcache.functional.state import CacheState, Coupling, GateState, GroupState
from afcache.settings.config import CacheConfig

# Image tokens of a group's summaries.
COARSE_TOKENS = 64


def shard_length(length: int, shards: int) -> int:
    """Tokens of each of several equal shards, padding included."""
    return -(-length // shards)


def coarse_length(img_seq: int, shards: int = 1) -> int:
    """Image tokens of a summary of a shard of `img_seq` tokens: 64 over all shards, at most one for each token."""
    return min(shard_length(COARSE_TOKENS, shards), img_seq)


def init_state(
    batch: int,
    img_seq: int,
    dim: int,
    *,
    config: CacheConfig,
    txt_seq: int = 0,
    num_blocks: int = 1,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> CacheState:
    """Make the empty state of one guidance branch.

    Args:
        batch, img_seq, dim: shape of the image tokens inside the transformer.
        config: settings.
        txt_seq: text tokens; asked for by groups, and by blocks that run at every step.
        num_blocks: of the transformer; asked for by groups.
        shards: ranks that share the tokens; the state holds one rank's.
        dtype: of the residuals; statistics are float32.
        device: where everything lives.
    Cost:
        config.num_nodes * batch * img_seq * dim elements of `dtype`; with groups, each holds as many, with text; the attention
        strategy holds one `[batch, seq, dim]` for every block.

    """
    nodes, whole_txt_seq = config.num_nodes, txt_seq
    img_seq, txt_seq = shard_length(img_seq, shards), shard_length(txt_seq, shards)
    tokens = img_seq
    if config.first_blocks or config.last_blocks:
        tokens = txt_seq + img_seq
    if config.layerwise is not None:
        tokens = 0
    zeros = torch.zeros(batch, dtype=torch.float32, device=device)
    counts = torch.zeros(batch, dtype=torch.int64, device=device)
    return CacheState(
        history=torch.zeros(nodes, batch, tokens, dim, dtype=dtype, device=device),
        nodes=torch.zeros(nodes, batch, dtype=torch.float32, device=device),
        steps=torch.zeros(nodes, batch, dtype=torch.float32, device=device),
        num_nodes=counts,
        error_rate=torch.full_like(zeros, float("inf")),
        error_order=counts.clone(),
        accumulated_error=zeros,
        last_gap=zeros.clone(),
        lag=zeros.clone(),
        extras=_init_extras(
            batch,
            img_seq,
            txt_seq,
            dim,
            num_blocks,
            mapped=whole_txt_seq + shards * coarse_length(img_seq, shards),
            coarse=txt_seq + coarse_length(img_seq, shards),
            config=config,
            dtype=dtype,
            device=device,
        ),
    )


def _init_extras(
    batch: int,
    img_seq: int,
    txt_seq: int,
    dim: int,
    num_blocks: int,
    *,
    mapped: int,
    coarse: int,
    config: CacheConfig,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, ...]:
    """State of gates and groups; `mapped` tokens have a place in attention maps, `coarse` of them in a rank's summaries."""

    def zeros(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, dtype=kind, device=device)

    if config.is_gated:
        reference = zeros(batch, img_seq, dim)
        return GateState(reference=reference, accumulated=zeros(batch), num_cached=zeros(batch, kind=torch.int64))
    if config.layerwise is None:
        return ()
    groups, nodes, strategy = config.layerwise.groups, config.num_nodes, config.layerwise.strategy
    seq = txt_seq + img_seq
    needs = {name: strategy in (name, "by_stability") for name in ("similarity", "difference", "attention")}
    return GroupState(
        history=zeros(groups, nodes, batch, seq, dim, kind=dtype),
        nodes=zeros(groups, nodes, batch),
        steps=zeros(groups, nodes, batch),
        num_nodes=zeros(groups, batch, kind=torch.int64),
        inputs=zeros(groups, batch, coarse * needs["similarity"], dim, kind=dtype),
        modulated=zeros(groups, batch, coarse * needs["difference"], dim, kind=dtype),
        attention_map=zeros(groups, batch, mapped * needs["attention"], mapped),
        attention=zeros(num_blocks, batch, seq * needs["attention"], dim, kind=dtype),
        stability=zeros(groups, batch),
        # The least stable class until something is known.
        stability_class=zeros(groups, batch, kind=torch.int64) + 3,
        num_measured=zeros(groups, batch, kind=torch.int64),
        gain=zeros(batch) + 1,
    )


def check_state(
    state: CacheState, *, batch: int, img_seq: int, dim: int, config: CacheConfig, txt_seq: int = 0, num_blocks: int = 1
) -> None:
    """Raise unless every field has the shape and dtype that the step expects.

    Raises:
        TypeError: a field is not a tensor.
        ValueError: a field has the wrong shape or dtype; the message names it.

    """
    expected = init_state(batch, img_seq, dim, config=config, txt_seq=txt_seq, num_blocks=num_blocks, device="meta")
    where = f"batch={batch}, img_seq={img_seq}, txt_seq={txt_seq}, dim={dim}"
    for name in CacheState._fields[:-1]:
        _check_field(f"CacheState.{name}", getattr(state, name), getattr(expected, name), where)
    if type(state.extras) is not type(expected.extras):
        raise TypeError(
            f"CacheState.extras must be {type(expected.extras).__name__} under these settings, got "
            f"{type(state.extras).__name__}. Start from init_state with the same config."
        )
    for name, value, model in zip(getattr(expected.extras, "_fields", ()), state.extras, expected.extras, strict=True):
        _check_field(f"{type(expected.extras).__name__}.{name}", value, model, where)


def _check_field(name: str, value: object, model: Tensor, where: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}. Start from init_state.")
    if value.shape != model.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, expected {tuple(model.shape)} for {where}. A new shape, or a config with "
            "another number of nodes or groups, needs a new state from init_state."
        )
    is_in_model_dtype = name.split(".")[1] in ("history", "inputs", "modulated", "attention")
    if not is_in_model_dtype and value.dtype != model.dtype:
        raise ValueError(f"{name} must be {model.dtype}, got {value.dtype}.")


def state_bytes(state: CacheState) -> int:
    """The memory that a state holds, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in pytree.tree_leaves(state))


def solo(batch: int, *, groups: int = 0, device: torch.device | str = "cpu") -> Coupling:
    """The coupling of a trajectory without guidance branches: the one branch leads and weighs 1."""
    zeros = torch.zeros(batch, dtype=torch.float32, device=device)
    return Coupling(
        is_follower=torch.zeros((), dtype=torch.bool, device=device),
        leader_refresh=torch.zeros(batch, dtype=torch.bool, device=device),
        weight=torch.ones_like(zeros),
        others_error=zeros,
        leader_choice=torch.zeros(groups, batch, dtype=torch.int64, device=device),
    )
