"""Videos at equal quality, and what flickers: mini-Wan under every peer's cache, block evaluations counted, nothing compiled.

    python -m bench.compare_videos                                       # UniPC, 30 steps, 32 clips that were never looked at
    python -m bench.compare_videos --scheduler FlowMatchEuler --steps 50 --clips 8
    python -m bench.compare_videos --targets --clips 16                  # what to forecast: residual, velocity or noise

The contenders are those of `compare_compiled --mini-wan`, which takes their seconds. Here every clip is drawn once, on one
thread, each contender in a process of its own; --processes of them at a time. What was measured is kept in --runs, and not
measured again: ours by its settings, others by name.
"""

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import afcache
from afcache.settings.presets import resolve_config, tuned
from bench.compare_targets import VARIANTS
from bench.mini_wan.sampling import SCHEDULERS
from bench.race import contenders as race
from bench.race.contender import Contender, do_nothing
from bench.race.contender_process import StepClock, count_evaluations
from bench.race.equal_videos import OURS, PSNR, SPEED, as_steady, at_equal_quality
from bench.race.peers import calibrate_magcache
from bench.race.subjects import Task, draw, load
from bench.race.turns import is_installed
from bench.record.naming import RESULTS, RUNS
from bench.record.recording import write_result
from bench.record.render import table

FIRST_SEED = 16000
TOLERANCES = (0.002, 0.004, 0.008, 0.012, 0.016, 0.024, 0.026, 0.032, 0.045, 0.064, 0.09, 0.128)
FEWER = "fewer steps"
# What do videos gain by presets of their own?
OF_IMAGES, OF_IMAGES_TOLERANCES = "AFCache, presets of images", (0.008, 0.012, 0.016, 0.024, 0.032, 0.045)

# Of peers whose knobs in the race are far apart on videos: ones between these and beyond.
BETWEEN: dict[str, tuple[tuple[str, Any], ...]] = {
    "diffusers FirstBlockCache": (("0.08", 0.08),),
    "diffusers MagCache": (("0.03", (0.03, 2)), ("0.48", (0.48, 8))),
}


class Job(NamedTuple):
    """One contender's clips.

    Attributes:
        name: of the contender.
        task: what it does.
        seeds: one clip each.
        references: uncached clips `[frames, height, width, 3]`, in the order of seeds.

    """

    name: str
    task: Task
    seeds: Sequence[int]
    references: Sequence[np.ndarray] = ()


def racing(task: Task) -> list[Contender]:
    """Ours at every tolerance, the presets, all peers that take Wan, and fewer steps."""
    known = [c for c in race.contenders() if c.races(task.model) and not c.is_compiled and c.kind in ("ours", "peer")]
    # The race's own tolerances are among these.
    known = [c for c in known if "tolerance" not in c.name]
    tolerances = [
        _ours(f"{OURS} tolerance {value:g}", OURS, resolve_config(tolerance=value, draws_videos=True)) for value in TOLERANCES
    ]
    of_images = [_ours(f"{OF_IMAGES}, {value:g}", OF_IMAGES, tuned(value)) for value in OF_IMAGES_TOLERANCES]
    return [*tolerances, *of_images, *known, *_between(known), *_fewer(task)]


def forecasting(task: Task) -> list[Contender]:
    """Every target, with all else the same and with settings of its own."""
    targets = [_ours(f"{name} {value:g}", name, at(value)) for name, at in VARIANTS.items() for value in TOLERANCES]
    return [*targets, *_fewer(task)]


def _ours(name: str, family: str, config: afcache.CacheConfig) -> Contender:
    return Contender(name, family, "ours", False, partial(_enable, config=config))


def _enable(pipe: Any, task: Task, *, config: afcache.CacheConfig) -> None:
    del task
    afcache.compile_pipeline(pipe, config, compile=False)


def _between(known: Sequence[Contender]) -> list[Contender]:
    first = {contender.family: contender for contender in reversed(known)}
    return [
        first[family]._replace(name=f"{family} {label}", enable=partial(first[family].enable.func, knob=knob))
        for family, knobs in BETWEEN.items()
        for label, knob in knobs
    ]


def _fewer(task: Task) -> list[Contender]:
    counts = sorted({round(task.steps / share) for share in (1.25, 1.5, 2, 2.5, 3, 4, 5)}, reverse=True)
    return [Contender(f"{count} steps", FEWER, "control", False, do_nothing, step_share=count / task.steps) for count in counts]


def everybody(task: Task) -> dict[str, Contender]:
    """All contenders by name."""
    return {c.name: c for c in (*race.contenders()[:1], *racing(task), *forecasting(task))}


def clips_of(job: Job) -> tuple[list[np.ndarray], float]:
    """Clips, and the mean number of evaluations of a block for each of them, over both branches of guidance."""
    torch.set_num_threads(1)
    contender, task = everybody(job.task)[job.name], job.task
    pipe = load(task)
    contender.enable(pipe, task)
    clock, steps = StepClock(pipe.scheduler), round(task.steps * contender.step_share)
    clips, evaluations = [], 0.0
    for seed in job.seeds:
        evaluations += sum(
            count_evaluations(
                pipe.transformer,
                clock,
                steps,
                lambda seed=seed: clips.append(draw(pipe, task, seed, steps=steps)),
                calls=task.calls,
            )
        )
    return clips, evaluations / len(job.seeds)


def measure(job: Job) -> dict[str, Any]:
    """A contender's row; what stopped it, if something did."""
    contender = everybody(job.task)[job.name]
    row: dict[str, Any] = {"contender": job.name, "family": contender.family, "kind": contender.kind, "failure": None}
    if not is_installed(contender):
        return row | {"failure": f"{contender.module} is not installed"}
    try:
        clips, evaluations = clips_of(job)
    except Exception as error:
        message = (str(error).strip() or "no message").splitlines()[0]
        return row | {"failure": f"{type(error).__name__}: {message[:160]}"}
    quality = [afcache.clip_quality(clip, reference) for clip, reference in zip(clips, job.references, strict=True)]
    psnr = [min(clip.psnr, 150.0) for clip in quality]
    return row | {
        SPEED: job.task.steps / evaluations,
        PSNR: statistics.mean(psnr),
        "worst clip": min(psnr),
        "worst frame": min(min(clip.worst_frame, 150.0) for clip in quality),
        "SSIM": statistics.mean(clip.ssim for clip in quality),
        "flicker": statistics.mean(clip.flicker for clip in quality),
        "unsteadiness": statistics.mean(clip.unsteadiness for clip in quality),
    }


def key_of(contender: Contender, task: Task, seeds: Sequence[int]) -> str:
    """What a row is of, in one line."""
    given = getattr(contender.enable, "keywords", {})
    named = given.get("settings", {})
    config = given.get("config", resolve_config(**named, draws_videos=True) if named else None)
    facts = {"scheduler": task.scheduler, "steps": task.steps, "seeds": [seeds[0], seeds[-1]], "contender": contender.name}
    return json.dumps(facts | ({} if config is None else {"config": config.to_dict()}), sort_keys=True)


def run(task: Task, chosen: Sequence[str], seeds: Sequence[int], *, processes: int, runs: Path) -> list[dict[str, Any]]:
    """The rows of all contenders, each in a process of its own; those that a file holds are read."""
    known: dict[str, dict[str, Any]] = {}
    for line in runs.read_text().splitlines() if runs.exists() else ():
        known |= json.loads(line)
    keys = {name: key_of(everybody(task)[name], task, seeds) for name in chosen}
    missing = [name for name, key in keys.items() if key not in known]
    if missing:
        runs.parent.mkdir(parents=True, exist_ok=True)
        with runs.open("a") as file:
            for row in _drawn(task, missing, seeds, processes=processes):
                print(*(f"{value:.4g}" if isinstance(value, float) else value for value in row.values()), sep="  ", flush=True)
                known[keys[row["contender"]]] = row
                file.write(json.dumps({keys[row["contender"]]: row}) + "\n")
                file.flush()
    return [known[key] for key in keys.values()]


def _drawn(task: Task, chosen: Sequence[str], seeds: Sequence[int], *, processes: int) -> Iterator[dict[str, Any]]:
    """Rows as they are measured."""
    fork = multiprocessing.get_context("forkserver")
    # Imported once, and not by every process.
    fork.set_forkserver_preload(["bench.race.contender_process", "cache_dit"])
    with fork.Pool(processes, maxtasksperchild=1) as pool:
        shares = [Job("eager", task, seeds[index::processes]) for index in range(processes)]
        drawn = {
            seed: clip
            for job, (clips, _) in zip(shares, pool.imap(clips_of, shares), strict=True)
            for seed, clip in zip(job.seeds, clips, strict=True)
        }
        jobs = [Job(name, task, seeds, [drawn[seed] for seed in seeds]) for name in chosen]
        yield from pool.imap(measure, jobs)


def shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The readable rows: what failed says so where its numbers would stand."""
    keys = (SPEED, PSNR, "worst clip", "worst frame", "SSIM", "flicker", "unsteadiness")
    return [
        {"contender": row["contender"], **{key: row.get(key, "") for key in keys}, "failure": row["failure"] or ""}
        for row in rows
    ]


def main() -> None:
    """Draw, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scheduler", choices=SCHEDULERS, default="UniPC")
    add("--steps", type=int, default=30, help="denoising steps (default 30)")
    add("--clips", type=int, default=32, help=f"seeds {FIRST_SEED} and up (default 32)")
    add("--targets", action="store_true", help="what to forecast, in place of the peers")
    add("--contenders", nargs="+", default=[""], help="parts of names (default: all)")
    add("--processes", type=int, default=2, help="contenders at a time, each on one thread (default 2)")
    add("--runs", type=Path, default=RUNS / "videos.jsonl", help="file of what was measured")
    add("--output", type=Path, default=RESULTS, help="folder of the tables")
    arguments = parser.parse_args()
    task = Task("mini-wan", arguments.steps, scheduler=arguments.scheduler)
    if not arguments.targets:
        pipe = load(task)
        ratios = calibrate_magcache(pipe, task.steps, lambda: draw(pipe, task, FIRST_SEED - 1))
        task = task._replace(mag_ratios=ratios)
    chosen = [c.name for c in (forecasting if arguments.targets else racing)(task)]
    chosen = [name for name in chosen if any(part in name for part in arguments.contenders)]
    seeds = range(FIRST_SEED, FIRST_SEED + arguments.clips)
    rows = run(task, chosen, seeds, processes=arguments.processes, runs=arguments.runs)
    equal, steady = at_equal_quality(rows), as_steady(rows)
    notes = [
        f"mini-Wan, {task.steps} steps, {arguments.scheduler}, guidance as recommended. Seeds {seeds.start} to "
        f"{seeds.stop - 1}, one clip each, float32, nothing compiled; against the uncached clip of the same seed. PSNR in "
        "float64 of all its frames.",
        "Block evaluations are counted by hooks; a block's two attentions and its MLP count the same. They are no wall clock.",
        "Flicker: what changes from frame to frame and should not, relative to what moves; unsteadiness: the part of the error "
        "that changes from frame to frame, about 1 where frames err each by itself. Both are means over the clips; the worst "
        "frame is that of all clips.",
        f"MagCache's ratios, of its own calibration: {[round(ratio, 4) for ratio in task.mag_ratios] or 'not used'}.",
        "",
        "At equal mean PSNR, linearly between a family's knobs, those families that reach it:",
        "",
        table(equal),
        "",
        *(["Ours where it flickers no more than the fastest peer does there:", "", table(steady), ""] if steady else []),
        "All of them:",
        "",
    ]
    print(table(equal), *([table(steady)] if steady else []), sep="\n\n")
    part = f"{'targets_' if arguments.targets else ''}{arguments.scheduler.lower()}_{task.steps}"
    title = f"{'What to forecast in videos' if arguments.targets else 'Videos under every cache'}: mini-Wan"
    everything = [*rows, *equal, *steady]
    print(write_result("videos", title, everything, notes=notes, shown=shown(rows), part=part, folder=arguments.output))


if __name__ == "__main__":
    main()
