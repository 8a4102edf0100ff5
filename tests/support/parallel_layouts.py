"""Which ranks are started, each layout once, and all that they do before they end."""

import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.support.forked import prepare_forks
from tests.support.parallel_cases import Drawn

ROOT = Path(__file__).parent.parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
SECONDS = 840


class Task(NamedTuple):
    """One image.

    Attributes:
        case: its name in `parallel_cases.CASES`.
        is_compiled: by the case's backend; otherwise it is drawn eagerly.
        is_checked: whether the ranks vote on every decision.

    """

    case: str
    is_compiled: bool = False
    is_checked: bool = False

    def __str__(self) -> str:
        return self.case + " compiled" * self.is_compiled + " checked" * self.is_checked


def compiled(*cases: str) -> tuple[Task, ...]:
    return tuple(Task(case, is_compiled=True) for case in cases)


def eager(*cases: str) -> tuple[Task, ...]:
    return tuple(Task(case) for case in cases)


def voted(*cases: str) -> tuple[Task, ...]:
    """Compiled, with the votes inside of the graph."""
    return tuple(Task(case, is_compiled=True, is_checked=True) for case in cases)


def counted(*cases: str) -> tuple[Task, ...]:
    """Eagerly, where every message can be counted, with votes."""
    return tuple(Task(case, is_checked=True) for case in cases)


class Layout(NamedTuple):
    """Ranks that are started together.

    Attributes:
        degrees: fields of `ParallelConfig`; their product is the number of ranks.
        tasks: the images that they draw.
        stories: names of `parallel_mishaps.STORIES`, told after that, in order.
        survivors: ranks that must come to their end where others fail; empty: all must.

    """

    degrees: dict[str, int]
    tasks: tuple[Task, ...] = ()
    stories: tuple[str, ...] = ()
    survivors: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.degrees.values())


# A compiled case takes as long as ten eager ones. What is compiled is therefore divided between the layouts: the attention of
# each is compiled, and so is each kind of case in one of them; with inductor where tokens travel both ways.
LAYOUTS = {
    "ulysses": Layout(
        {"ulysses_degree": 2},
        compiled("first and last blocks", "looked into", "looked into, noise", "noise, guided")
        + voted("short text", "two groups")
        + eager("divisible", "short text", "long text, odd image", "odd everything", "teacache", "uncached", "guided")
        + eager("layerwise", "controlnet", "image prompt", "eager")
        + eager("velocity", "noise", "noise, solver", "noise, controlnet", "counted, noise")
        + counted("layerwise", "counted", "counted, layerwise", "counted, first and last blocks", "counted, uncached")
        + counted("counted, noise"),
        ("sizes", "otherwise", "using", "using, noise", "last bit", "disagree", "killed"),
        survivors=(0,),
    ),
    "ring": Layout(
        {"ring_degree": 2},
        compiled("odd everything", "teacache", "controlnet", "guided")
        + eager("divisible", "short text", "long text, odd image", "first and last blocks", "layerwise", "uncached")
        + eager("two groups", "image prompt", "eager", "noise, guided")
        + counted("counted", "counted, layerwise", "counted, first and last blocks", "counted, uncached"),
        ("command line",),
    ),
    "guidance": Layout(
        {"cfg_degree": 2},
        compiled("guided", "two groups, guided", "noise, guided")
        + eager("teacache, guided", "layerwise, guided", "controlnet, guided", "image prompt, guided")
        + eager("reference image, guided", "noise, controlnet, guided", "noise, reference image, guided", "counted, noise")
        + eager("noise, solver, guided")
        + counted("counted", "counted, layerwise", "counted, noise"),
        ("stopped",),
        survivors=(0,),
    ),
    "ulysses and ring": Layout(
        {"ulysses_degree": 2, "ring_degree": 2},
        compiled("inductor")
        + voted("noise, guided")
        + eager("odd everything", "long text, odd image", "layerwise, odd", "noise"),
    ),
    "ulysses and guidance": Layout({"ulysses_degree": 2, "cfg_degree": 2}, compiled("guided") + eager("noise, guided")),
    "ring and guidance": Layout({"ring_degree": 2, "cfg_degree": 2}, eager("teacache, guided")),
    "replicas": Layout({"data_degree": 2}, stories=("replicas", "replicas, noise")),
    "hosts": Layout({"ulysses_degree": 2}, stories=("xfuser", "diffusers, ulysses", "diffusers, ring")),
    "divided otherwise": Layout({"ulysses_degree": 2}, stories=("divide otherwise",), survivors=(0, 1)),
}


class Met(NamedTuple):
    """What one rank drew and met.

    Attributes:
        drawn: by task.
        stories: what it met, by story.

    """

    drawn: dict[Task, Drawn]
    stories: dict[str, Any]


def start(name: str, folder: Path) -> list[Met]:
    """Start a layout's ranks; what each drew and met, of those that got lost until then.

    They are forked from one process that has imported everything, with what torchrun would tell them.
    """
    layout = LAYOUTS[name]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fork = prepare_forks()
    shared = {"WORLD_SIZE": str(layout.size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(layout.size):
        ranks.append(fork.Process(target=live, args=(name, folder, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})))
        ranks[rank].start()
    survivors = layout.survivors or range(layout.size)
    try:
        end = time.monotonic() + SECONDS
        for rank in survivors:
            ranks[rank].join(end - time.monotonic())
            # What one has met, the others wait for; nobody stops them.
            if ranks[rank].exitcode != 0:
                break
        statuses = [ranks[rank].exitcode for rank in survivors]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    said = [(folder / f"rank{rank}.txt").read_text()[-4000:] for rank in range(layout.size)]
    assert all(status == 0 for status in statuses), said
    return [read(folder, rank) for rank in range(layout.size)]


def live(name: str, folder: Path, environment: dict[str, str]) -> None:
    """One rank's life, in a process of its own; what it says goes to a file."""
    os.environ.update(environment)
    with (folder / f"rank{environment['RANK']}.txt").open("w") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
    from tests.support.parallel_worker import main

    main(LAYOUTS[name], folder)


def read(folder: Path, rank: int) -> Met:
    """What a rank has written."""
    drawn, stories = torch.load(folder / f"rank{rank}.pt")
    return Met({Task(*task): Drawn(**fields) for task, fields in drawn}, stories)


def write(folder: Path, rank: int, met: Met) -> None:
    """As values that need no code to be read."""
    drawn = [(tuple(task), drawn._asdict()) for task, drawn in met.drawn.items()]
    torch.save((drawn, met.stories), folder / f"rank{rank}.pt")


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command that starts ranks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
