"""Several processes that draw one image: which groups they form.

xfuser owns processes and groups. Its model wrappers are not used: they mutate state at run time and disable the compiler inside
attention, so only the mathematics that is traced is written again (`afcache.functional.ranks.attention`).
"""

import importlib
import importlib.util
import os
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from afcache.functional.ranks.attention import SequenceRanks
from afcache.functional.ranks.collectives import Ranks
from afcache.functional.ranks.step import Layout
from afcache.parallel.config import ParallelConfig
from afcache.parallel.xfuser_on_cpu import import_on_cpu

T = TypeVar("T")
_DEGREES = "afcache/degrees"
# Seconds in which a rank reads what the others wrote there.
_READING = 10.0
_COMMAND = "torchrun --nproc-per-node {count} your_script.py"
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class ParallelContext:
    """The groups of a parallel run, read once from xfuser. Equal contexts make equal graphs.

    Attributes:
        layout: the ranks that draw one image together.
        data: the replicas, of which this process belongs to one.
        rank: of this process among all.
        world_size: of all processes.
        control: name of a group of `layout.replica` whose messages go through CPU memory.

    """

    layout: Layout
    data: Ranks
    rank: int
    world_size: int
    control: str

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes for its replica."""
        return self.layout.replica.rank == 0

    @property
    def splits_guidance(self) -> bool:
        """Whether guidance branches are computed by different ranks."""
        return self.layout.cfg.size > 1


def connect(config: ParallelConfig) -> ParallelContext:
    """Join the other processes through xfuser, or read the groups that were made before.

    Raises:
        RuntimeError: this process was not started by torchrun; there are more or fewer processes than the degrees need; the
            groups that xfuser has are others; or xfuser cannot be imported. The message says what to do.
        NotImplementedError: xfuser's groups include tensor or pipeline parallelism.

    """
    if not dist.is_initialized():
        missing = [name for name in _ENVIRONMENT if name not in os.environ]
        if missing:
            raise RuntimeError(
                f"parallel={config} needs {config.processes} processes, and this one was not started by torchrun "
                f"({', '.join(missing)} not set). Start the same script on all of them: "
                f"{_COMMAND.format(count=config.processes)}"
            )
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    if world_size != config.processes:
        degrees = " * ".join(f"{f.name} {getattr(config, f.name)}" for f in fields(config) if f.name.endswith("degree"))
        raise RuntimeError(
            f"the product of the degrees must be the number of processes, {world_size}, got {degrees} = {config.processes}. "
            f"Change a degree, or start {config.processes}: {_COMMAND.format(count=config.processes)}"
        )
    state = _import_parallel_state(config)
    if not dist.is_initialized() or state._WORLD is None:
        state.init_distributed_environment(backend=config.backend)
    if not state.model_parallel_is_initialized():
        _check_degrees(config)
        state.initialize_model_parallel(
            data_parallel_degree=config.data_degree,
            classifier_free_guidance_degree=config.cfg_degree,
            sequence_parallel_degree=config.ulysses_degree * config.ring_degree,
            ulysses_degree=config.ulysses_degree,
            ring_degree=config.ring_degree,
            backend=config.backend,
        )
    context = _read(state, config)
    if config.timeout is not None:
        _limit_waiting(state, config.timeout)
    return context


def _check_degrees(config: ParallelConfig) -> None:
    """Raise if ranks are about to make groups of different degrees, which would wait for each other."""
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    degrees = ", ".join(f"{f.name}={getattr(config, f.name)}" for f in fields(config) if f.name.endswith("degree"))
    store.set(f"{_DEGREES}/{rank}", degrees)
    keys = [f"{_DEGREES}/{other}" for other in range(dist.get_world_size())]
    if config.timeout is not None:
        store.wait(keys, timedelta(seconds=config.timeout))
    given = [store.get(key).decode() for key in keys]
    store.set(f"{_DEGREES}/read/{rank}", "")
    for other, theirs in enumerate(given):
        if theirs != given[0]:
            if rank == 0:  # It may host the store: its end must not cut off a rank that still reads.
                with suppress(dist.DistError):
                    store.wait([f"{_DEGREES}/read/{reader}" for reader in range(len(keys))], timedelta(seconds=_READING))
            raise RuntimeError(
                f"rank 0 was given parallel=ParallelConfig({given[0]}) and rank {other} ParallelConfig({theirs}). Pass the "
                "same degrees on all ranks."
            )


def _limit_waiting(state: Any, seconds: float) -> None:
    """Set the time-out of all groups: xfuser makes them with torch's time-outs."""
    coordinators = (state.get_sp_group(), state.get_cfg_group(), state.get_model_replica_group())
    groups = [group for owner in coordinators for group in (owner.device_group, owner.cpu_group)]
    groups += [group for name in ("ulysses_group", "ring_group") if (group := getattr(coordinators[0], name, None)) is not None]
    for group in groups:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def _import_parallel_state(config: ParallelConfig) -> Any:
    try:
        if config.backend == "gloo":
            import_on_cpu()
        return importlib.import_module("xfuser.core.distributed.parallel_state")
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        cure = "Install it with pip install xfuser" if isinstance(error, ModuleNotFoundError) else "It needs a GPU"
        raise RuntimeError(
            f"xfuser, which makes the process groups, could not be imported: {reason}. {cure}; on a machine without one, "
            "ParallelConfig(backend='gloo') runs on CPU processes."
        ) from error


def _read(state: Any, config: ParallelConfig) -> ParallelContext:
    """Read xfuser's groups once; the traced step knows names and numbers alone."""
    for name, group in (("tensor", state.get_tp_group()), ("pipeline (pipefusion)", state.get_pp_group())):
        if group.world_size > 1:
            raise NotImplementedError(
                f"xfuser was initialised with {name} parallelism over {group.world_size} ranks, which is not supported under "
                "caching. Use ulysses_degree, ring_degree and cfg_degree."
            )
    if config.shares_sequence and not importlib.util.find_spec("yunchang"):
        raise RuntimeError(
            "xfuser makes no groups for Ulysses and ring attention without yunchang, which is not installed. "
            "Install it with pip install yunchang."
        )
    sp, cfg, replica = state.get_sp_group(), state.get_cfg_group(), state.get_model_replica_group()
    found = {
        "ulysses_degree": sp.ulysses_world_size,
        "ring_degree": sp.ring_world_size,
        "cfg_degree": cfg.world_size,
        "data_degree": state.get_data_parallel_world_size(),
    }
    other = [f"{name} {value}" for name, value in found.items() if value != getattr(config, name)]
    if other:
        raise RuntimeError(
            f"xfuser was initialised with {', '.join(other)} in this process, which is not what parallel={config} says. Pass "
            "the same degrees, or leave the initialisation to afcache."
        )
    sequence = SequenceRanks(
        whole=_ranks(sp.device_group),
        ulysses=_ranks(sp.ulysses_group) if sp.ulysses_world_size > 1 else Ranks(),
        ring=_ranks(sp.ring_group) if sp.ring_world_size > 1 else Ranks(),
    )
    layout = Layout(sequence, _ranks(cfg.device_group), _ranks(replica.device_group), config.check_decisions)
    expected = layout.sequence.ring.rank * layout.sequence.ulysses.size + layout.sequence.ulysses.rank
    if sequence.whole.rank != expected or replica.rank_in_group != layout.cfg.rank * sequence.whole.size + sequence.whole.rank:
        raise RuntimeError(
            f"xfuser's groups have an order that is not known: {layout}. Ulysses ranks must be neighbours within a sequence, "
            "and a sequence's ranks neighbours within a replica, as initialize_model_parallel of xfuser 0.7 makes them."
        )
    data = Ranks(rank=state.get_data_parallel_rank(), size=state.get_data_parallel_world_size())
    return ParallelContext(layout, data, dist.get_rank(), dist.get_world_size(), replica.cpu_group.group_name)


def _ranks(group: Any) -> Ranks:
    return Ranks(str(group.group_name), dist.get_rank(group), dist.get_world_size(group))


def check_heads(config: ParallelConfig, heads: int) -> None:
    """Raise unless the heads can be dealt out.

    Raises:
        ValueError: naming the degree and the number of heads.

    """
    if heads % config.ulysses_degree:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"ulysses_degree must divide the number of attention heads, {heads}, got {config.ulysses_degree}. Use one of "
            f"{', '.join(map(str, fitting))}, and ring_degree for the rest."
        )


def check_device(device: torch.device) -> None:
    """Raise if the model lies on another process's GPU.

    Raises:
        ValueError: naming both, and how to move it.

    """
    own = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda" and (device.index or 0) != own:
        raise ValueError(
            f"transformer must be on cuda:{own}, the GPU of this process (LOCAL_RANK {own}), got {device}. Call "
            "pipe.to(f\"cuda:{os.environ['LOCAL_RANK']}\") before compile_pipeline."
        )
