"""AFCache beside the compiled model, fewer steps and the real peers: same model, seeds and machine, one run.

    python bench/compare_compiled.py --mini --quick          # one knob of every peer
    python bench/compare_compiled.py --mini                  # every knob, compiled and eager; over half an hour
    python bench/compare_compiled.py --mini-wan --eager      # videos: block evaluations and quality, nothing compiled
    python bench/compare_compiled.py --random small          # what cached steps cost; quality is not compared
    python bench/compare_compiled.py --random medium --patterns bench/results/compare_mini_cpu_YYYYMM.json
    python bench/compare_compiled.py --random flux1 --dtype bfloat16 --at-once 1
    python bench/compare_compiled.py --random qwen_image_small    # two calls of the transformer a step, by turns
    python bench/compare_compiled.py --random wan_small           # a video, and UniPC
    python bench/compare_compiled.py --model black-forest-labs/FLUX.1-dev --dtype bfloat16 --at-once 1
    python bench/compare_compiled.py --check                 # the pages' numbers against bench/results
    python -m bench.record.readme_tables                     # the pages' tables, made of bench/results

Every contender runs in a process of its own, with a fresh pipeline, compiled without any compilation cache. A few processes
live at once, and with them always the uncached pipeline, eager and compiled; they draw one seed after the other in turns, so
that every time is compared with one taken moments away. Install the peers with `pip install -c constraints.txt -e ".[bench]"`.

Memory: every process holds the whole model, the two references' too, so `--at-once 1` needs three times its size. Its
weights, counted, are 34 GB in bfloat16 for FLUX.1-dev and 24 GB for `--random flux1`, so 101 and 72 GB, and activations.
"""

import argparse
import gc
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

# Started as a file, Python looks for modules beside it; bench is found from one folder above.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
# Start-up warnings of other libraries tell a reader of this table nothing; the contenders' own words go to their logs.
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from diffusers.utils import logging
from transformers.utils import logging as transformers_logging

from bench import readme_numbers
from bench.models.random_model import RANDOM
from bench.race import compare_report
from bench.race.contender import Contender
from bench.race.contenders import contenders
from bench.race.equal_quality import interpolation_notes, quality_rows, shown_quality, verdict
from bench.race.peers import calibrate_magcache
from bench.race.pictures import draw_quality, draw_time
from bench.race.subjects import DTYPES, Task, draw, load
from bench.race.turns import is_installed, run
from bench.record.naming import result_path
from bench.record.recording import write_result
from bench.record.render import table

OUTPUT = Path("outputs/compare")
# Refreshes of every contender on random weights, unless --patterns tells: two steps of warmup, then every fourth.
PATTERN = "FF" + "...F" * 6 + ".."
FIRST_SEED = 3000


def _task(arguments: argparse.Namespace) -> Task:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task = Task(_model(arguments), arguments.steps, arguments.resolution, arguments.dtype, device, backend=arguments.backend)
    if not task.is_random:
        ratios = _calibrate(task)
        # Its pipeline is garbage now, and the contenders need the memory.
        gc.collect()
        torch.cuda.empty_cache()
        return task._replace(mag_ratios=ratios)
    told = {name: row["pattern"] for name, row in (arguments.patterns or {}).items()}
    return task._replace(patterns=told | {"": (PATTERN * (task.steps // len(PATTERN) + 1))[: task.steps]})


def _model(arguments: argparse.Namespace) -> str:
    if arguments.mini_wan:
        return "mini-wan"
    return "mini" if arguments.mini else f"random:{arguments.random}" if arguments.random else arguments.model


def _calibrate(task: Task) -> tuple[float, ...]:
    pipe = load(task)
    return calibrate_magcache(pipe, task.steps, lambda: draw(pipe, task, FIRST_SEED - 1))


def _measured(path: str) -> dict[str, dict[str, Any]]:
    """Rows of a run by contender, those that did not fail."""
    try:
        rows = json.loads(Path(path).read_text())["rows"]
        return {row["contender"]: row for row in rows if row.get("pattern")}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{path} is no result of this command ({type(error).__name__}: {error}).") from error


def _complaint(arguments: argparse.Namespace, chosen: Sequence[Contender]) -> str | None:
    """What is wrong with options that would have no effect, or another than they say."""
    if (arguments.mini or arguments.mini_wan) and arguments.resolution:
        return "--resolution cannot be given with --mini or --mini-wan: mini-FLUX and mini-Wan have one size."
    if arguments.patterns is None:
        return None
    if not arguments.random:
        return "--patterns needs --random: other models decide by themselves."
    steps = len(arguments.patterns["eager"]["pattern"]) if "eager" in arguments.patterns else 0
    if steps != arguments.steps:
        return f"--patterns are of {steps} steps, and --steps is {arguments.steps}."
    strangers = [c.name for c in chosen if c.force and is_installed(c) and c.name not in arguments.patterns]
    if strangers:
        return f"--patterns know nothing of {strangers[0]!r}: repeat the run that they are of, or name --contenders."
    return None


def _choose(wanted: Sequence[str], *, model: str, of_each: Literal["every knob", "one knob", "one pattern"]) -> list[Contender]:
    everybody = [contender for contender in contenders() if contender.races(model)]
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
    what.add_argument("--mini-wan", action="store_true", help="mini-Wan, which draws videos, and comes with the package, too")
    what.add_argument("--random", choices=RANDOM, help="random weights: the cost of cached steps, never quality")
    what.add_argument("--model", help="a folder or hub id of a FLUX.1 pipeline")
    what.add_argument(
        "--check", action="store_true", help="check the numbers of README and docs/ against bench/results, and stop"
    )
    parser.add_argument("--steps", type=int, default=28, help="denoising steps (default 28)")
    parser.add_argument("--seeds", type=int, help="images per contender (default 24; 4 with --quick or --random)")
    parser.add_argument("--contenders", nargs="+", default=[], help="parts of names (default: all)")
    parser.add_argument("--resolution", type=int, help="pixels of a side; mini-FLUX has one size")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default float32)")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument(
        "--patterns",
        type=_measured,
        metavar="JSON",
        help="of a run on a trained model: with --random, every contender refreshes as it did there on the first image, seed "
        f"{FIRST_SEED} alone",
    )
    parser.add_argument(
        "--at-once",
        type=int,
        help="processes beside the two references', each with a whole model in memory (default 6; on a GPU 1)",
    )
    parser.add_argument("--eager", action="store_true", help="compile nothing but the reference")
    parser.add_argument("--quick", action="store_true", help="one knob of every peer, 4 images, two compile at a time")
    parser.add_argument("--limit", type=float, default=1800, help="seconds that a contender may take for one answer")
    parser.add_argument(
        "--output",
        type=Path,
        default=OUTPUT,
        help=f"folder of tables and pictures (default {OUTPUT}; logs go there anyway)",
    )
    arguments = parser.parse_args()
    if arguments.check:
        readme_numbers.check()
        return
    forces_one_pattern = arguments.random and not arguments.patterns
    of_each = "one pattern" if forces_one_pattern else "one knob" if arguments.quick else "every knob"
    chosen = _choose(arguments.contenders, model=_model(arguments), of_each=of_each)
    if arguments.eager:
        # The references race anyway, and times are compared with the compiled one's, too.
        chosen = [contender for contender in chosen if contender.kind == "reference" or not contender.is_compiled]
    if complaint := _complaint(arguments, chosen):
        parser.error(complaint)
    _compare(arguments, chosen)


def _compare(arguments: argparse.Namespace, chosen: Sequence[Contender]) -> None:
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    task = _task(arguments)
    count = arguments.seeds or (4 if arguments.quick or task.is_random else 24)
    races = run(
        task,
        chosen,
        range(FIRST_SEED, FIRST_SEED + count),
        at_once=arguments.at_once or (1 if task.device == "cuda" else 6),
        warm_up=2 if arguments.quick else 1,
        logs=OUTPUT / "logs",
        limit=arguments.limit,
    )
    order = [contender.name for contender in contenders()]
    finished = sorted(races, key=lambda race: order.index(race.contender.name))
    rows = [compare_report.row(race, task) for race in finished]
    for row in rows:
        row |= _quality_there(arguments.patterns, row["contender"])
    heading = compare_report.heading(task, count)
    shown = [compare_report.shown(row) for row in rows]
    print(heading, table(shown), *verdict(rows, is_random=task.is_random, is_quick=arguments.quick), sep="\n")
    model = Path(task.model.replace(":", "_").replace("-", "_")).name
    subject = f"compare_{model}{'_quick' if arguments.quick else ''}"
    notes = compare_report.notes(task, count, is_quick=arguments.quick)
    measured = [row for row in rows if "seconds" in row]
    where: dict[str, Any] = {"device": task.device, "folder": arguments.output}
    written = write_result(subject, heading, rows, notes=notes, shown=shown, **where)
    if not task.is_random:
        best = quality_rows(rows)
        notes += interpolation_notes(best)
        title = "Fastest at equal quality, over the uncached pipeline of the same mode"
        fastest = [shown_quality(row) for row in best]
        write_result(subject, title, best, notes=notes, shown=fastest, part="fastest", **where)
        draw_quality(measured, result_path(subject, ".png", part="quality", **where))
    draw_time(measured, result_path(subject, ".png", part="time", **where))
    print(f"written to {arguments.output}/: {written.name}, {written.stem}.json and pictures")


def _quality_there(measured: dict[str, dict[str, Any]] | None, name: str) -> dict[str, float]:
    """PSNR, mean and worst, of the run that a contender's refreshes are of."""
    row = (measured or {}).get(name, {})
    return {f"{key}_with_these_decisions": row[key] for key in ("psnr", "psnr_worst") if key in row}


if __name__ == "__main__":
    main()
