"""AFCache beside the compiled model, fewer steps and the real peers: same model, seeds and machine, one run.

    python bench/compare_compiled.py --mini --quick          # every contender in a quarter of an hour
    python bench/compare_compiled.py --mini                  # every knob: what bench/results holds; half an hour
    python bench/compare_compiled.py --random small          # what cached steps cost; quality is not compared
    python bench/compare_compiled.py --random medium --patterns bench/results/compare_mini_cpu_202611.json
    python bench/compare_compiled.py --random flux1 --dtype bfloat16 --at-once 1
    python bench/compare_compiled.py --model black-forest-labs/FLUX.1-dev --dtype bfloat16 --at-once 1
    python bench/compare_compiled.py --check                 # README's numbers against bench/results

Every contender runs in a process of its own, with a fresh pipeline, compiled without any compilation cache. A few processes
live at once, and with them always the uncached pipeline, eager and compiled; they draw one seed after the other in turns, so
that every time is compared with one taken moments away. Install the peers with `pip install -c constraints.txt -e ".[bench]"`.
"""

import argparse
import gc
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

# Started as a file, Python looks for modules beside it; bench is found from one folder above.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
# Start-up warnings of other libraries tell a reader of this table nothing; the contenders' own words go to their logs.
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from diffusers.utils import logging
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from bench import compare_report, readme_numbers
from bench.contender_process import Drawn, Finished, Racer, Ready
from bench.contenders import Contender, calibrate_magcache, contenders
from bench.recording import table, write_result
from bench.subjects import DTYPES, SIZES, Task, draw, load

REFERENCES = ("eager", "compiled")
OUTPUT = Path("outputs/compare")
# Refreshes of every contender on random weights, unless --patterns tells: two steps of warmup, then every fourth.
PATTERN = "FF" + "...F" * 6 + ".."
FIRST_SEED = 3000


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
    _check(references, logs)
    first_times: dict[str, dict[int, Drawn]] = {}
    with tqdm(total=len(others), unit="contender", smoothing=0) as bar:
        for batch in batches:
            bar.set_description(", ".join(contender.name for contender in batch)[:60])
            racers = {contender.name: racer_of(contender) for contender in batch if _is_installed(contender)}
            with ThreadPoolExecutor(warm_up) as pool:
                ready |= dict(zip(racers, pool.map(Racer.start, racers.values()), strict=True))
            times = _rounds({**references, **racers}, seeds)
            _check(references, logs)
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


def _check(references: dict[str, Racer], logs: Path) -> None:
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


def _is_installed(contender: Contender) -> bool:
    return importlib.util.find_spec(contender.module) is not None


def _task(arguments: argparse.Namespace) -> Task:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = "mini" if arguments.mini else f"random:{arguments.random}" if arguments.random else arguments.model
    task = Task(model, arguments.steps, arguments.resolution, arguments.dtype, device, backend=arguments.backend)
    if not task.is_random:
        pipe = load(task)
        ratios = calibrate_magcache(pipe, task.steps, lambda: draw(pipe, task, FIRST_SEED - 1))
        # The contenders need the memory.
        del pipe
        gc.collect()
        torch.cuda.empty_cache()
        return task._replace(mag_ratios=ratios)
    patterns = {"": (PATTERN * (task.steps // len(PATTERN) + 1))[: task.steps]}
    if arguments.patterns:
        rows = json.loads(arguments.patterns.read_text())["rows"]
        known = {row["contender"]: row["pattern"] for row in rows if row.get("pattern")}
        if not any(len(pattern) == task.steps for pattern in known.values()):
            length = max(map(len, known.values()), default=0)
            raise SystemExit(f"--patterns {arguments.patterns}: patterns have {length} steps, and --steps is {task.steps}.")
        patterns |= {name: pattern for name, pattern in known.items() if len(pattern) == task.steps}
    return task._replace(patterns=patterns)


def _choose(wanted: Sequence[str], *, of_each: Literal["every knob", "one knob", "one pattern"]) -> list[Contender]:
    everybody = contenders()
    if wanted:
        unknown = [name for name in wanted if not any(name in c.name for c in everybody)]
        if unknown:
            names = "\n  ".join(contender.name for contender in everybody)
            raise SystemExit(f"--contenders must be parts of names; none has {unknown[0]!r}. There are:\n  {names}")
        return [c for c in everybody if any(name in c.name for name in wanted)]
    if of_each == "every knob":
        return everybody
    # One knob of every peer, in the middle; where refreshes are forced, one contender of every family.
    chosen = []
    for family, members in itertools.groupby(everybody, key=lambda c: (c.family, c.is_compiled)):
        group = list(members)
        is_ours = family[0] == "AFCache" and of_each == "one knob"
        chosen += group if is_ours else [group[(len(group) - 1) // 2]]
    return chosen


def main() -> None:
    """Measure, print, and write tables, JSON and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--mini", action="store_true", help="mini-FLUX, which comes with the package")
    what.add_argument("--random", choices=SIZES, help="random weights: the cost of cached steps, never quality")
    what.add_argument("--model", help="a folder or hub id of a FLUX.1 pipeline")
    what.add_argument("--check", action="store_true", help="check README's numbers against bench/results, and stop")
    parser.add_argument("--steps", type=int, default=28, help="denoising steps (default 28)")
    parser.add_argument("--seeds", type=int, help="images per contender (default 24; 4 with --quick or --random)")
    parser.add_argument("--contenders", nargs="+", default=[], help="parts of names (default: all)")
    parser.add_argument("--resolution", type=int, help="pixels of a side; mini-FLUX has one size")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default float32)")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument(
        "--patterns", type=Path, help="JSON of a run with --mini: with --random, every contender refreshes as at its first seed"
    )
    parser.add_argument(
        "--at-once",
        type=int,
        help="processes beside the two references', each with a model of its own in memory (default 6; on a GPU 1)",
    )
    parser.add_argument("--quick", action="store_true", help="one knob of every peer, 4 images, two compile at a time")
    parser.add_argument("--limit", type=float, default=1800, help="seconds that a contender may take for one answer")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"folder of the tables (default: {OUTPUT}; logs too)")
    arguments = parser.parse_args()
    if arguments.check:
        readme_numbers.check()
        return
    if arguments.mini and arguments.resolution:
        parser.error("--resolution cannot be given with --mini: mini-FLUX has one size.")
    if arguments.patterns and not arguments.random:
        parser.error("--patterns needs --random: other models decide by themselves.")
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    task = _task(arguments)
    count = arguments.seeds or (4 if arguments.quick or task.is_random else 24)
    seeds = range(FIRST_SEED, FIRST_SEED + count)
    forces_one_pattern = task.is_random and not arguments.patterns
    of_each = "one pattern" if forces_one_pattern else "one knob" if arguments.quick else "every knob"
    chosen = _choose(arguments.contenders, of_each=of_each)
    output = arguments.output
    races = run(
        task,
        chosen,
        seeds,
        at_once=arguments.at_once or (1 if task.device == "cuda" else 6),
        warm_up=2 if arguments.quick else 1,
        logs=OUTPUT / "logs",
        limit=arguments.limit,
    )
    order = [contender.name for contender in contenders()]
    finished = sorted(races, key=lambda race: order.index(race.contender.name))
    rows = [compare_report.row(race, task) for race in finished]
    print(compare_report.heading(task, count))
    shown = [compare_report.shown(row) for row in rows]
    print(table(shown))
    print("\n".join(compare_report.verdict(rows, task, is_quick=arguments.quick)))
    name = f"compare_{Path(task.model.replace(':', '_')).name}_{task.device}_202611"
    notes = compare_report.notes(task, count, is_quick=arguments.quick)
    write_result(name, compare_report.heading(task, count), rows, notes=notes, folder=output, shown=shown)
    if not task.is_random:
        best = compare_report.quality_rows(rows)
        write_result(
            f"{name}_fastest", "Fastest at equal quality, over the compiled pipeline", best, notes=notes, folder=output
        )
    compare_report.draw_pictures(rows, task, output / name)
    print(f"written to {output}/: {name}.md, {name}.json and pictures")


if __name__ == "__main__":
    main()
