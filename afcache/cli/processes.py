"""What the command line does where torchrun started it: who speaks, which device is whose, how the work is shared.

torch is imported by those functions alone that need it: an error in the arguments need not wait for it.
"""

import math
import os
import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from afcache.parallel.config import ParallelConfig


def count() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process prints and writes: the first of all, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def own_device(name: str | None, device: "torch.device") -> "torch.device":
    """The device of this process: GPUs are dealt out in order.

    Args:
        name: what the user asked for.
        device: what that means to a process that is alone.

    Raises:
        ValueError: one GPU was named for all processes, or there are fewer GPUs than processes.

    """
    if count() == 1 or device.type != "cuda":
        return device
    import torch

    if name is not None and torch.device(name).index is not None:
        raise ValueError(f"--device {name!r} is one GPU for {count()} processes. Use --device cuda: each takes its own.")
    rank, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if rank >= found:
        raise ValueError(
            f"torchrun started more processes on this machine than it has GPUs, {found}. Start {found}, or use --device cpu."
        )
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def choose_degrees(
    *, ulysses: int | None, ring: int | None, cfg: int | None, heads: int | None, is_guided: bool, device: "torch.device"
) -> "ParallelConfig | None":
    """The degrees that were asked for, and good ones for what was left open: None where one process does it all.

    Guidance branches are shared first, which exchange least; then heads, as far as they can be dealt out; then a ring.

    Args:
        ulysses, ring, cfg: degrees; None leaves them open.
        heads: of the model's attention; None where only one process can draw.
        is_guided: whether there are two guidance branches.
        device: CPU processes talk through gloo.

    Raises:
        ValueError: the degrees do not make up the processes, or there are no two branches to share.
        NotImplementedError: only one process can draw.

    """
    given = {"--ulysses": ulysses, "--ring": ring, "--cfg-parallel": cfg}
    given = {name: degree for name, degree in given.items() if degree is not None}
    needed, processes = math.prod(given.values()), count()
    if processes == needed == 1:
        return None
    if heads is None:
        raise NotImplementedError(
            f"{' and '.join(given) or f'{processes} processes'}: only FLUX.1 is drawn by several processes; start this "
            "model without torchrun and without these options. docs/several-gpus.md says what else there is."
        )
    if cfg == 2 and not is_guided:
        raise ValueError("--cfg-parallel 2 shares two guidance branches; give --true-cfg-scale above 1, too.")
    rest = processes // needed
    if cfg is None:
        cfg = 2 if is_guided and rest % 2 == 0 else 1
        rest //= cfg
    if ulysses is None:
        ulysses = max(math.gcd(rest, heads), 1)
        rest //= ulysses
    if ring is None:
        ring, rest = max(rest, 1), 1
    if heads % ulysses:
        raise ValueError(
            f"--ulysses must divide the model's attention heads, {heads}, got {ulysses}; --ring needs no such thing."
        )
    from afcache.parallel.config import ParallelConfig

    backend = "gloo" if device.type == "cpu" else None
    parallel = ParallelConfig(ulysses_degree=ulysses, ring_degree=ring, cfg_degree=cfg, backend=backend)
    if parallel.processes != processes:
        words = " ".join(f"{name} {degree}" for name, degree in given.items())
        raise ValueError(
            f"{words}: the product of the degrees must be the number of processes, {processes}, got {needed}. Start "
            f"{needed} with torchrun --nproc-per-node {needed} -m afcache {shlex.join(sys.argv[1:])}"
        )
    return parallel


def part() -> None:
    """Leave the other processes, when all is done."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def describe(parallel: "ParallelConfig") -> str:
    """One line for people."""
    shares = {"Ulysses": parallel.ulysses_degree, "ring": parallel.ring_degree, "guidance": parallel.cfg_degree}
    how = " x ".join(f"{name} {degree}" for name, degree in shares.items() if degree > 1)
    return f"{parallel.processes} processes: {how}"
