"""Empty states of the right shapes, and what checks them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from afcache.functional.model import Sizes
from afcache.functional.shapes import coarse_length, shard_length
from afcache.functional.solver_response import WINDOW
from afcache.functional.state import CacheState, Coupling, GateState, GroupState, Lead, SolverState, Trail
from afcache.settings.config import CacheConfig


class StateShape(NamedTuple):
    """What a guidance branch's state is made for; static.

    Attributes:
        batch, img_seq, dim: shape of the image tokens inside the transformer; where its output is forecast, of the latents.
        latents: shape of the latents after the batch, where the output is forecast and they are no tokens.
        channels: of the latents' tokens, where residuals are forecast; without, nothing notices latents that are elsewhere.
        responds: whether what a solver was given wrongly is returned (`afcache.functional.solver_response`).
        txt_seq: text tokens; asked for by groups, and by blocks that run at every step.
        num_blocks: of the transformer; asked for by groups.
        shards: ranks that share the tokens; the state holds one rank's.

    """

    batch: int
    img_seq: int
    dim: int
    txt_seq: int = 0
    num_blocks: int = 1
    shards: int = 1
    latents: tuple[int, ...] | None = None
    channels: int = 0
    responds: bool = False


def shape_of(sizes: Sizes, latents: torch.Size, txt_seq: int, *, config: CacheConfig) -> StateShape:
    """What a branch's state is made for, before ranks divide it.

    Args:
        sizes: of the transformer.
        latents: shape of a call's.
        txt_seq: tokens that the blocks see before the image's.
        config: settings.

    """
    batch, *rest = latents
    if config.forecasts_output:
        return StateShape(batch, 0, 0, txt_seq, sizes.num_blocks, latents=tuple(rest))
    img_seq, _ = rest
    return StateShape(batch, img_seq, sizes.dim, txt_seq, sizes.num_blocks, channels=sizes.channels)


def empty_state(
    shape: StateShape, *, config: CacheConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> CacheState:
    """Make the empty state of one guidance branch.

    Args:
        shape: what it is made for.
        config: settings.
        dtype: of residuals; statistics, and what is kept of outputs, are float32.
        device: where everything lives.
    Cost:
        config.num_nodes * batch * img_seq * dim elements of `dtype`; with groups, each holds as many, with text; the attention
        strategy holds one `[batch, seq, dim]` for every block.

    """
    nodes, batch = config.num_nodes, shape.batch
    dtype = torch.float32 if config.forecasts_output else dtype
    img_seq, txt_seq = shard_length(shape.img_seq, shape.shards), shard_length(shape.txt_seq, shape.shards)
    tokens = txt_seq + img_seq if config.runs_sections else img_seq
    kept = (0 if config.layerwise else tokens, shape.dim) if shape.latents is None else shape.latents
    zeros = torch.zeros(batch, dtype=torch.float32, device=device)
    counts = torch.zeros(batch, dtype=torch.int64, device=device)
    return CacheState(
        history=torch.zeros(nodes, batch, *kept, dtype=dtype, device=device),
        nodes=torch.zeros(nodes, batch, dtype=torch.float32, device=device),
        steps=torch.zeros(nodes, batch, dtype=torch.float32, device=device),
        num_nodes=counts,
        error_rate=torch.full_like(zeros, float("inf")),
        error_order=counts.clone(),
        accumulated_error=zeros,
        last_gap=zeros.clone(),
        lag=zeros.clone(),
        trail=_empty_trail(shape, config=config, device=device),
        gate=_empty_gate(shape, device=device) if config.rule.is_gated else None,
        groups=_empty_groups(shape, config=config, dtype=dtype, device=device),
        solver=_empty_solver(shape, config=config, device=device) if shape.responds else None,
        damping=torch.full_like(zeros, float("nan")) if config.learns_damping else None,
    )


def _empty_trail(shape: StateShape, *, config: CacheConfig, device: torch.device | str) -> Trail | None:
    latents = _latents_of(shape, config=config)
    # A rank that holds a share of the tokens sees a part of every distance.
    return empty_trail((shape.batch, *latents), device=device) if latents[-1] and shape.shards == 1 else None


def _empty_solver(shape: StateShape, *, config: CacheConfig, device: torch.device | str) -> SolverState:
    nothing = torch.zeros(WINDOW - 1, shape.batch, dtype=torch.float32, device=device)
    direction = torch.zeros(shape.batch, *_latents_of(shape, config=config), dtype=torch.float32, device=device)
    return SolverState(nothing, nothing.clone(), direction)


def _latents_of(shape: StateShape, *, config: CacheConfig) -> tuple[int, ...]:
    """Shape of a sample's latents; where residuals are forecast and nobody has said it, the last size is 0."""
    return shape.latents or (shape.img_seq, shape.dim if config.forecasts_output else shape.channels)


def empty_trail(latents: Sequence[int], *, device: torch.device | str = "cpu") -> Trail:
    """The trail of before the first step.

    Args:
        latents: their shape.
        device: where everything lives.

    """
    lengths = torch.zeros(latents[0], dtype=torch.float32, device=device)
    nothing = torch.zeros(*latents, dtype=torch.float32, device=device)
    return Trail(nothing, lengths, torch.full_like(lengths, float("nan")))


def _empty_gate(shape: StateShape, *, device: torch.device | str) -> GateState:
    img_seq = shard_length(shape.img_seq, shape.shards)
    return GateState(
        reference=torch.zeros(shape.batch, img_seq, shape.dim, dtype=torch.float32, device=device),
        accumulated=torch.zeros(shape.batch, dtype=torch.float32, device=device),
        num_cached=torch.zeros(shape.batch, dtype=torch.int64, device=device),
    )


def _empty_groups(
    shape: StateShape, *, config: CacheConfig, dtype: torch.dtype, device: torch.device | str
) -> GroupState | None:
    settings = config.layerwise
    if settings is None:
        return None

    def zeros(*sizes: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*sizes, dtype=kind, device=device)

    groups, nodes, batch, dim = settings.groups, config.num_nodes, shape.batch, shape.dim
    img_seq, txt_seq = shard_length(shape.img_seq, shape.shards), shard_length(shape.txt_seq, shape.shards)
    seq, pooled = txt_seq + img_seq, coarse_length(img_seq, shape.shards)
    # A rank's summaries hold its share; attention maps have a place for everybody's.
    coarse, mapped = txt_seq + pooled, shape.txt_seq + shape.shards * pooled
    return GroupState(
        history=zeros(groups, nodes, batch, seq, dim, kind=dtype),
        nodes=zeros(groups, nodes, batch),
        steps=zeros(groups, nodes, batch),
        num_nodes=zeros(groups, batch, kind=torch.int64),
        inputs=zeros(groups, batch, coarse * settings.uses("similarity"), dim, kind=dtype),
        modulated=zeros(groups, batch, coarse * settings.uses("difference"), dim, kind=dtype),
        attention_map=zeros(groups, batch, mapped * settings.uses("attention"), mapped),
        attention=zeros(shape.num_blocks, batch, seq * settings.uses("attention"), dim, kind=dtype),
        stability=zeros(groups, batch),
        # The least stable class until something is known.
        stability_class=zeros(groups, batch, kind=torch.int64) + 3,
        num_measured=zeros(groups, batch, kind=torch.int64),
        gain=zeros(batch) + 1,
    )


# Fields that are kept in the model's dtype; but for what is kept of outputs, which is float32.
_IN_MODEL_DTYPE = frozenset({"history", "inputs", "modulated", "attention"})


def check_fit(state: CacheState, shape: StateShape, *, config: CacheConfig) -> None:
    """Raise unless every field has the shape and dtype that the step expects.

    Raises:
        TypeError: a field is not a tensor, or a part that the settings ask for is missing.
        ValueError: a field has the wrong shape or dtype; the message names it.

    """
    expected = empty_state(shape, config=config, device="meta")
    tokens = f"img_seq={shape.img_seq}, txt_seq={shape.txt_seq}, dim={shape.dim}"
    where = f"batch={shape.batch}, {tokens if shape.latents is None else f'latents={tuple(shape.latents)}'}"
    for name, model in expected._asdict().items():
        value = getattr(state, name)
        if isinstance(model, Tensor):
            _check_field(
                f"CacheState.{name}", value, model, where, is_free=name in _IN_MODEL_DTYPE and not config.forecasts_output
            )
        elif type(value) is not type(model):
            raise TypeError(
                f"CacheState.{name} must be {_kind_of(model)} under these settings, got {_kind_of(value)}. Start from "
                "init_state with the same config."
            )
        elif model is not None:
            for inner, each in model._asdict().items():
                _check_field(f"{_kind_of(model)}.{inner}", getattr(value, inner), each, where, is_free=inner in _IN_MODEL_DTYPE)


def _kind_of(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _check_field(name: str, value: object, model: Tensor, where: str, *, is_free: bool) -> None:
    """Raise unless a field has the model's shape, and its dtype where that is not free."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}. Start from init_state.")
    if value.shape != model.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, expected {tuple(model.shape)} for {where}. A new shape, or a config with "
            "another number of nodes or groups, needs a new state from init_state."
        )
    if not is_free and value.dtype != model.dtype:
        raise ValueError(f"{name} must be {model.dtype}, got {value.dtype}.")


def check_values(state: CacheState, *, config: CacheConfig) -> None:
    """Raise unless every number is one to go on with; what no refresh has filled yet may hold anything.

    Raises:
        ValueError: a value is impossible; the message names its field.
    Cost:
        one pass over the history, and a host synchronisation for each field.

    """
    filled = torch.arange(config.num_nodes, device=state.num_nodes.device)[:, None] < state.num_nodes
    is_finite = state.history.flatten(2).isfinite().all(2) if state.history.numel() else torch.ones_like(filled)
    # Policies that go by no error may carry one that was never measured.
    is_free = torch.full_like(state.num_nodes, not config.rule.is_error_controlled, dtype=torch.bool)
    rules: tuple[tuple[str, str, Tensor], ...] = (
        ("num_nodes", f"between 0 and {config.num_nodes}", (state.num_nodes >= 0) & (state.num_nodes <= config.num_nodes)),
        ("error_rate", ">= 0, or infinite", (state.error_rate >= 0) | is_free),
        ("accumulated_error", ">= 0", (state.accumulated_error >= 0) | is_free),
        ("last_gap", "finite and >= 0", state.last_gap.isfinite() & (state.last_gap >= 0)),
        ("lag", "finite", state.lag.isfinite()),
        ("history", "finite where it was filled", (is_finite | ~filled).all(0)),
    )
    for name, rule, holds in rules:
        if not bool(holds.all()):
            sample = int(holds.logical_not().nonzero()[0])
            value = "" if name == "history" else f": {float(getattr(state, name)[sample]):g}"
            raise ValueError(
                f"CacheState.{name} must be {rule}, and is not for sample {sample}{value}. Start from init_state, or from a "
                "checkpoint whose image is whole."
            )


def state_bytes(state: CacheState) -> int:
    """The memory that a state holds, in bytes."""
    tensors = (leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def uncoupled(batch: int, *, groups: int = 0, device: torch.device | str = "cpu") -> Coupling:
    """The coupling of a trajectory without guidance branches: the one branch leads and weighs 1."""
    zeros = torch.zeros(batch, dtype=torch.float32, device=device)
    return Coupling(
        is_follower=torch.zeros((), dtype=torch.bool, device=device),
        leader_refresh=torch.zeros(batch, dtype=torch.bool, device=device),
        weight=torch.ones_like(zeros),
        others_error=zeros,
        leader_choice=torch.zeros(groups, batch, dtype=torch.int64, device=device) if groups else None,
        trails=(),
        leader_restarted=torch.zeros(batch, dtype=torch.bool, device=device),
    )


def unled(coupling: Coupling, latents: Tensor) -> Coupling:
    """The coupling of a branch that others may follow, called one after the other: the guided error can be measured.

    Args:
        coupling: without that.
        latents: of a call, for shape and dtype of its velocities.

    """
    nothing = Lead(torch.zeros_like(latents), torch.zeros_like(latents))
    return coupling._replace(guidance_scale=torch.full_like(coupling.weight, float("nan")), lead=nothing)
