"""What keeps processes that draw one image together: they compare their tasks and decisions, and name a rank that is lost."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from afcache.functional.state import StepRecord
from afcache.parallel.groups import ParallelContext


def check_same_task(context: ParallelContext, task: dict[str, Tensor | int | float]) -> None:
    """Compare what the ranks of one image are about to draw, before the first collective of the step could hang.

    Args:
        context: who takes part.
        task: what must be equal, by the name that the user knows it by; tensors are compared by shape and content.

    Raises:
        RuntimeError: naming what differs, and the ranks.

    """
    mine = torch.tensor([_fingerprint(value) for value in task.values()], dtype=torch.float64)
    names: Any = dist.distributed_c10d
    group = names._resolve_process_group(context.control)
    everybody = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    try:
        dist.all_gather(everybody, mine, group=group)
    except RuntimeError as error:
        raise lost_rank(context, "at the start of an image") from error
    first = dist.get_global_rank(group, 0)
    for rank, theirs in enumerate(everybody):
        names = [name for name, a, b in zip(task, everybody[0], theirs, strict=True) if a != b]
        if names:
            # Ranks at different calls differ in everything else, too.
            names = names[:1] if names[0] == next(iter(task)) and len(names) > 1 else names
            other = dist.get_global_rank(group, rank)
            raise RuntimeError(
                f"ranks {first} and {other} were given different {', '.join(names)}, but draw one image together. Call the "
                "pipeline with the same arguments and generator seeds on all ranks, or use data_degree for images of their own."
            )


def adopt_first(context: ParallelContext, value: Tensor) -> Tensor:
    """The tensor as the first rank of the replica has it, through CPU memory; ranks were compared before.

    Args:
        context: who takes part.
        value: of the same shape on all of them.

    """
    names: Any = dist.distributed_c10d
    group = names._resolve_process_group(context.control)
    theirs = value.cpu().clone()
    dist.broadcast(theirs, dist.get_global_rank(group, 0), group=group)
    return theirs.to(value.device)


def _fingerprint(value: Tensor | int | float) -> float:
    """A number that tells tensors apart; NaN would differ from itself."""
    if not isinstance(value, Tensor):
        return float(value)
    x = torch.nan_to_num(value.detach().to(torch.float64)).flatten()
    weights = torch.linspace(1, 2, max(x.numel(), 1), dtype=torch.float64, device=x.device)[: x.numel()]
    shape = sum(length * 1e-3**axis for axis, length in enumerate(value.shape, start=1))
    return float((x * weights).sum().cpu()) + shape


def check_votes(record: StepRecord | None, step: int) -> None:
    """Raise if the ranks decided differently at a step (`ParallelConfig.check_decisions`).

    Raises:
        RuntimeError: naming the step and the ranks.

    """
    for vote in () if record is None or record.votes is None else record.votes:
        others = [rank for rank in range(vote.shape[0]) if not torch.equal(vote[rank], vote[0])]
        if others:
            raise RuntimeError(
                f"ranks decided differently at step {step}: rank 0 of the replica chose {vote[0].tolist()} (0 computes), "
                + ", ".join(f"rank {rank} {vote[rank].tolist()}" for rank in others)
                + ". The step was computed wherever any rank wanted it. Please report this."
            )


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed, rather than the step."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection closed"))


def lost_rank(context: ParallelContext, where: str) -> RuntimeError:
    """What to raise when a collective failed."""
    return RuntimeError(
        f"rank {context.rank} of {context.world_size} lost another rank {where}: a process has ended, failed or is stuck. The "
        "first error among the ranks' outputs tells why; start all of them again."
    )
