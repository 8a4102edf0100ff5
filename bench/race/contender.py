"""What a contender is, and how one is compiled."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from afcache.runtime.compiled import CompileOptions
from bench.race.subjects import Task

Kind = Literal["reference", "ours", "peer", "control"]
# (pipeline, task) -> None: switch a cache on, nothing compiled yet.
Enable = Callable[[Any, Task], None]
# (pipeline, pattern) -> None: the same with refreshes where the pattern says "F"; random weights ask for it.
Force = Callable[[Any, str], None]


class Contender(NamedTuple):
    """A way to run the pipeline.

    Attributes:
        name: unique; as tables show it.
        family: contenders of one family and one `is_compiled` are points on one curve.
        kind: what it is to us.
        is_compiled: whether torch.compile runs it.
        enable: set-up before compilation.
        compile: (pipeline, task) -> None; None where `enable` has done it, or nothing is compiled.
        force: set-up with given refreshes; None where they cannot be given.
        step_share: share of the task's steps that it walks.
        module: package that must be installed.
        only: a family of models; "" for all.

    """

    name: str
    family: str
    kind: Kind
    is_compiled: bool
    enable: Enable
    compile: Callable[[Any, Task], None] | None = None
    force: Force | None = None
    step_share: float = 1.0
    module: str = "diffusers"
    only: str = ""

    def races(self, model: str) -> bool:
        """Whether it is meant for a task's model."""
        return model.startswith((f"random:{self.only}", f"mini-{self.only}")) if self.only else True


_LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks")


def blocks_of(transformer: Any) -> list[Any]:
    """All blocks of a transformer of diffusers, in the order in which they run."""
    return [block for name in _LISTS for block in getattr(transformer, name, ())]


def do_nothing(pipe: Any, task: Task) -> None:
    """Enable no cache."""
    del pipe, task


def _tuning(task: Task) -> dict[str, Any]:
    """The settings of inductor that compile_pipeline uses: everybody gets them."""
    return CompileOptions(backend=task.backend).tuning() if task.backend == "inductor" else {}


def compile_whole(pipe: Any, task: Task, *, fullgraph: bool = False) -> None:
    """Compile the transformer."""
    pipe.transformer.compile(fullgraph=fullgraph, backend=task.backend, **_tuning(task))


def compile_regions(pipe: Any, task: Task) -> None:
    """Compile its blocks, each kind once."""
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=task.backend, **_tuning(task))
