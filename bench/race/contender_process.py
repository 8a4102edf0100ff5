"""One contender in a process of its own: set up, warmed up, and then one image whenever it is asked."""

import multiprocessing
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import afcache
from bench.race.contender import blocks_of
from bench.race.contenders import contenders
from bench.race.subjects import Task, draw, load
from bench.record.clock import seconds_of, start_clock

# Nothing that another process has loaded, warmed up or changed: tests, which measure nothing, start theirs otherwise.
START_METHOD = "spawn"
_RECOMPILE_LIMIT = 1024
# Dynamo's warning names the limit that it hit: this one, or the accumulated one.
GAVE_UP = "recompile_limit"


class Ready(NamedTuple):
    """A contender after its first image.

    Attributes:
        first_call: seconds of the first image, compilation included.
        evaluations: by seed: share of the block evaluations that ran at each step, an attention or an MLP counting half.
        graphs: that Dynamo made.
        graph_breaks: that it met.

    """

    first_call: float
    evaluations: dict[int, list[float]]
    graphs: int
    graph_breaks: int


class Drawn(NamedTuple):
    """An image.

    Attributes:
        pixels: `[height, width, 3]` in [0, 1]; of random weights latents.
        seconds: of the pipeline.
        step_seconds: of the transformer at each step, with the pipeline's arithmetic around it.

    """

    pixels: np.ndarray
    seconds: float
    step_seconds: list[float]


class Finished(NamedTuple):
    """A contender after its last image.

    Attributes:
        recompiled_graphs: made since the first one.
        peak_mib: of memory, on its device.
        hit_limit: whether Dynamo gave up compiling some function again, and ran it eagerly.

    """

    recompiled_graphs: int
    peak_mib: float
    hit_limit: bool = False


class Failed(NamedTuple):
    """What stopped a contender, in one line; its log has the rest."""

    error: str


class StepClock:
    """Seconds between a scheduler's steps: the transformer's, whatever forward is bound to it or compiled around it."""

    def __init__(self, scheduler: Any, device: str = "cpu") -> None:
        self.seconds: list[float] = []
        self._device = torch.device(device)
        self._stop = start_clock(self._device)
        self._begin, self._step = scheduler.set_begin_index, scheduler.step
        scheduler.set_begin_index, scheduler.step = self._on_begin, self._on_step

    def _on_begin(self, *args: Any, **kwargs: Any) -> Any:
        result = self._begin(*args, **kwargs)
        self.seconds = []
        self._stop = start_clock(self._device)
        return result

    def _on_step(self, *args: Any, **kwargs: Any) -> Any:
        # Waits for a GPU: its work on the step is part of the step's time.
        self.seconds.append(self._stop()())
        result = self._step(*args, **kwargs)
        self._stop = start_clock(self._device)
        return result


def count_evaluations(
    transformer: Any, clock: StepClock, steps: int, sample: Callable[[], Any], *, calls: int = 1
) -> list[float]:
    """Share of the block evaluations at each step of an eager image, counted where they happen, whoever skips them.

    A block's attentions and its MLP count the same.

    Args:
        transformer: whose blocks are counted.
        clock: of the pipeline's scheduler.
        steps: of the image.
        sample: draws it.
        calls: of the transformer at each step.

    """
    counts = [0] * steps

    def count(module: Any, args: Any) -> None:
        del module, args
        counts[len(clock.seconds)] += 1

    parts = [part for block in blocks_of(transformer) for part in _parts(block)]
    hooks = [part.register_forward_pre_hook(count) for part in parts]
    sample()
    for hook in hooks:
        hook.remove()
    return [number / (calls * len(parts)) for number in counts]


def _parts(block: Any) -> Iterator[Any]:
    """The first layer of each attention of a block, and of its MLP."""
    yield from (part.to_q for part in block.children() if hasattr(part, "to_q"))
    mlps = (getattr(block, name) for name in ("ff", "img_mlp", "ffn") if hasattr(block, name))
    yield next((mlp.net[0].proj for mlp in mlps), getattr(block, "proj_mlp", None))


def pattern_of(shares: Sequence[float]) -> str:
    """One letter per step: F where all blocks ran."""
    return "".join("F" if share > 0.99 else "." for share in shares)


class _Session:
    def __init__(self, name: str, task: Task, seeds: Sequence[int]) -> None:
        torch.compiler.config.force_disable_caches = True
        # Some caches ask for more graphs of one function than Dynamo's 8, beyond which it would run them eagerly.
        torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
        torch._dynamo.config.accumulated_recompile_limit = _RECOMPILE_LIMIT
        self._contender = next(contender for contender in contenders() if contender.name == name)
        self._task = task
        self.steps = round(task.steps * self._contender.step_share)
        self._pipe = load(task)
        told = self._enable()
        self._cuda = torch.cuda if task.device == "cuda" else None
        self._clock = StepClock(self._pipe.scheduler, task.device)
        self._counters = torch._dynamo.utils.counters
        self._count_by_seed = {seed: self._count(seed) for seed in (seeds[:1] if task.is_random else seeds)}
        if told is not None:
            check_forced(told, {pattern_of(shares) for shares in self._count_by_seed.values()})
        if self._contender.compile is not None:
            self._contender.compile(self._pipe, task)
        self._counters.clear()
        first_call = self.draw(seeds[0]).seconds
        if told is not None and self._contender.kind == "ours":
            # What was counted ran eagerly; here is what the compiled step did.
            report = afcache.report(self._pipe)
            check_forced(told, {report.pattern(branch) for branch in range(task.calls)})
        self.ready = Ready(first_call, self._count_by_seed, self._graphs(), sum(self._counters["graph_break"].values()))
        if self._cuda:
            self._cuda.reset_peak_memory_stats()

    def _enable(self) -> str | None:
        """Switch the cache on; the pattern of refreshes that was forced, or None."""
        contender, patterns = self._contender, self._task.patterns
        if patterns is None or contender.force is None:
            contender.enable(self._pipe, self._task)
            return None
        pattern = patterns.get(contender.name, patterns[""])
        contender.force(self._pipe, pattern)
        return pattern

    def _graphs(self) -> int:
        return self._counters["stats"]["unique_graphs"]

    def _count(self, seed: int) -> list[float]:
        def sample() -> Any:
            return draw(self._pipe, self._task, seed, steps=self.steps)

        return count_evaluations(self._pipe.transformer, self._clock, self.steps, sample, calls=self._task.calls)

    def draw(self, seed: int) -> Drawn:
        pixels, seconds = seconds_of(lambda: draw(self._pipe, self._task, seed, steps=self.steps), self._task.device)
        return Drawn(pixels, seconds, list(self._clock.seconds))

    def finish(self) -> Finished:
        peak = self._cuda.max_memory_allocated() / 2**20 if self._cuda else peak_mib()
        return Finished(self._graphs() - self.ready.graphs, peak)


def check_forced(told: str, done: set[str]) -> None:
    """Costs of a contender that refreshes at other steps than it was told to would be compared with the wrong promise."""
    if done != {told}:
        raise RuntimeError(f"told to refresh at {told}, it did at {', '.join(sorted(done))}")


def peak_mib(status: Path = Path("/proc/self/status")) -> float:
    """Of this process; where the system does not say, `ru_maxrss`, which is inherited from the one that started it."""
    lines = status.read_text().splitlines() if status.exists() else []
    kib = (int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return next(kib, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024


def _serve(connection: Connection, name: str, task: Task, seeds: Sequence[int], log: Path) -> None:
    """The process: everything that anybody prints goes to the log."""
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
        try:
            session = _Session(name, task, seeds)
            connection.send(session.ready)
            while (seed := connection.recv()) is not None:
                connection.send(session.draw(seed))
            finished = session.finish()
            sys.stderr.flush()
            connection.send(finished._replace(hit_limit=GAVE_UP in log.read_text(errors="replace")))
        except Exception as error:
            traceback.print_exc()
            message = (str(error).strip() or "no message").splitlines()[0]
            connection.send(Failed(f"{type(error).__name__}: {message[:160]}"))


class Racer:
    """The other end: a contender's process, asked for one thing at a time.

    Args:
        name: of the contender.
        task: what it does.
        seeds: of the images to come.
        log: file for what it prints.
        limit: seconds that an answer may take.

    """

    def __init__(self, name: str, task: Task, seeds: Sequence[int], log: Path, limit: float) -> None:
        self.name = name
        self.failure: str | None = None
        self._limit = limit
        context = multiprocessing.get_context(START_METHOD)
        self._connection, self._theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._theirs, name, task, list(seeds), log), daemon=True)

    def start(self) -> Ready | None:
        """Start the process and let it draw its first image; None if it failed."""
        self._process.start()
        self._theirs.close()
        return self._receive()

    def draw(self, seed: int) -> Drawn | None:
        """One image; None if it failed, now or before."""
        return self._ask(seed)

    def finish(self) -> Finished | None:
        """End the process."""
        result = self._ask(None)
        self._end()
        return result

    def _end(self) -> None:
        """Let the process clean up after itself, but not for ever."""
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()

    def _ask(self, message: int | None) -> Any:
        if self.failure is not None:
            return None
        try:
            self._connection.send(message)
        except OSError:
            self.failure = f"its process ended with code {self._process.exitcode}"
            return None
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = (
                self._connection.recv() if self._connection.poll(self._limit) else Failed(f"no answer in {self._limit:g} s")
            )
        except EOFError:
            self._process.join(timeout=10)
            answer = Failed(f"its process ended with code {self._process.exitcode}")
        if isinstance(answer, Failed):
            self.failure = answer.error
            self._end()
            return None
        return answer
