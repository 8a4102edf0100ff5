"""A race: every contender in a process of its own, all drawing one seed after the other in turns."""

import importlib.util
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from bench.race.contender import Contender
from bench.race.contender_process import Drawn, Finished, Racer, Ready
from bench.race.contenders import contenders
from bench.race.subjects import Task

REFERENCES = ("eager", "compiled")


class Race(NamedTuple):
    """All there is to know of one contender's run.

    Attributes:
        contender: who.
        failure: what stopped it, or None.
        ready, finished: what its process said at the start and at the end.
        drawn: its images by seed.
        rivals: times of the references on the same seeds, taken in the same turns: `{"eager": {seed: Drawn}, ...}`.

    """

    contender: Contender
    failure: str | None
    ready: Ready | None
    finished: Finished | None
    drawn: dict[int, Drawn]
    rivals: dict[str, dict[int, Drawn]]


def run(
    task: Task, chosen: Sequence[Contender], seeds: Sequence[int], *, at_once: int, warm_up: int, logs: Path, limit: float
) -> Iterator[Race]:
    """Let the contenders race, `at_once` of them at a time beside the two references.

    Args:
        task: what everybody does.
        chosen: who; the references are among them or added.
        seeds: one image each.
        at_once: processes beside the references'.
        warm_up: processes that compile at the same time; 1 for honest first calls.
        logs: folder for what the processes print.
        limit: seconds for any answer.

    """
    logs.mkdir(parents=True, exist_ok=True)

    def racer_of(contender: Contender) -> Racer:
        return Racer(contender.name, task, seeds, logs / f"{contender.name.replace('/', '_')}.log", limit)

    by_name = {contender.name: contender for contender in contenders()}
    others = [contender for contender in chosen if contender.name not in REFERENCES]
    batches = [others[i : i + at_once] for i in range(0, len(others), at_once)] or [[]]
    references = {name: racer_of(by_name[name]) for name in REFERENCES}
    ready = {name: racer.start() for name, racer in references.items()}
    check_references(references, logs)
    first_times: dict[str, dict[int, Drawn]] = {}
    with tqdm(total=len(others), unit="contender", smoothing=0) as bar:
        for batch in batches:
            bar.set_description(", ".join(contender.name for contender in batch)[:60])
            racers = {contender.name: racer_of(contender) for contender in batch if is_installed(contender)}
            with ThreadPoolExecutor(warm_up) as pool:
                ready |= dict(zip(racers, pool.map(Racer.start, racers.values()), strict=True))
            times = _rounds({**references, **racers}, seeds)
            check_references(references, logs)
            rivals = {name: times[name] for name in REFERENCES}
            first_times = first_times or rivals
            for contender in batch:
                racer = racers.get(contender.name)
                finished = racer.finish() if racer else None
                failure = racer.failure if racer else f"{contender.module} is not installed"
                known = ready.get(contender.name)
                yield Race(contender, failure, known, finished, times.get(contender.name, {}), rivals)
            bar.update(len(batch))
    for name, racer in references.items():
        yield Race(by_name[name], None, ready[name], racer.finish(), first_times[name], first_times)


def check_references(references: dict[str, Racer], logs: Path) -> None:
    """Nothing can be said without the uncached pipeline."""
    if failed := [racer for racer in references.values() if racer.failure]:
        raise SystemExit(f"the uncached pipeline itself failed ({failed[0].name}): {failed[0].failure}; see {logs}/")


def _rounds(racers: dict[str, Racer], seeds: Sequence[int]) -> dict[str, dict[int, Drawn]]:
    """One image of every seed from everybody, in turns; whoever comes first in one round comes later in the next."""
    names = list(racers)
    drawn: dict[str, dict[int, Drawn]] = {name: {} for name in names}
    for index, seed in enumerate(seeds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            image = racers[name].draw(seed)
            if image is not None:
                drawn[name][seed] = image
    return drawn


def is_installed(contender: Contender) -> bool:
    """Whether the package that a contender needs is there."""
    return importlib.util.find_spec(contender.module) is not None
