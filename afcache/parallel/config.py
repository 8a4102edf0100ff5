"""How many processes share the work, and how."""

from dataclasses import dataclass

from afcache._checks import check_flag, check_integer, check_number


@dataclass(frozen=True)
class ParallelConfig:
    """How many processes share the work, and how; the product is the number of processes that torchrun starts.

    Attributes:
        ulysses_degree: ranks that share a sequence and exchange attention heads; divides the number of heads.
        ring_degree: ranks that share a sequence and pass keys and values on.
        cfg_degree: 2: the two branches of true CFG are computed by different ranks.
        data_degree: groups of ranks that draw images of their own, and never wait for each other.
        backend: of torch.distributed; None is xfuser's choice for this machine (NCCL on GPUs). "gloo" runs on CPU processes.
        check_decisions: let all ranks vote on every decision, and raise naming rank and step if they differ; waits for the
            device at every step.
        timeout: seconds that a rank waits for others before it gives up; None is torch's choice, 10 minutes with NCCL and 30
            with gloo.

    Raises:
        ValueError, TypeError: a value is out of its range.

    """

    ulysses_degree: int = 1
    ring_degree: int = 1
    cfg_degree: int = 1
    data_degree: int = 1
    backend: str | None = None
    check_decisions: bool = False
    timeout: float | None = None

    def __post_init__(self) -> None:
        for name in ("ulysses_degree", "ring_degree", "data_degree"):
            check_integer(name, getattr(self, name), 1, None)
        check_integer("cfg_degree", self.cfg_degree, 1, 2)
        check_flag("check_decisions", self.check_decisions)
        if self.timeout is not None:
            check_number("timeout", self.timeout, 1, 86400)
        if self.backend not in (None, "gloo", "nccl"):
            raise ValueError(f"backend must be None, 'nccl' or 'gloo', got {self.backend!r}.")

    @property
    def shares_sequence(self) -> bool:
        """Whether ranks share the tokens of an image."""
        return self.ulysses_degree * self.ring_degree > 1

    @property
    def processes(self) -> int:
        """How many processes there must be."""
        return self.ulysses_degree * self.ring_degree * self.cfg_degree * self.data_degree
