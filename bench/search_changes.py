"""Each setting of the presets changed alone, on images and on videos: is there a change that gains on both?

    python -m bench.search_changes               # some 25 minutes of two cores
    python -m bench.search_changes --only images # seven minutes of them
    python -m bench.search_changes --few         # two seeds, one change: a look whether it runs

Speed at equal mean PSNR, by sweeping the tolerance, relative to the presets' own rule. Seeds are those that searches may look
at: 0 and up for images of mini-FLUX and of "strokes", 15000 and up for clips of mini-Wan.
"""

import argparse
import dataclasses
import math
import multiprocessing
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import afcache
from afcache.settings.presets import resolve_config
from bench.mini_flux import sampling
from bench.mini_flux.recipe import RECIPES
from bench.mini_wan import sampling as clips
from bench.record.naming import RESULTS
from bench.record.recording import write_result
from bench.record.render import table
from bench.search.curves import Point, speed_at

PRESETS = "the presets"
# Whether it is videos.
_KINDS = {"images": False, "videos": True}
CHANGES: dict[str, dict[str, Any]] = {
    PRESETS: {},
    "damping as set": {"learns_damping": False},
    "order 0": {"order": 0},
    "order 2": {"order": 2},
    "error_exponent 1": {"error_exponent": 1.0},
    "error_exponent 2": {"error_exponent": 2.0},
    # Videos have 0 and three steps, images 0.5 and two.
    "error_weight 0": {"error_weight": 0.0},
    "error_weight 0.5": {"error_weight": 0.5},
    "error_weight 1": {"error_weight": 1.0},
    "early_weight 0": {"early_weight": 0.0},
    "early_weight 0.75": {"early_weight": 0.75},
    "warmup_steps 2": {"warmup_steps": 2},
    "warmup_steps 3": {"warmup_steps": 3},
    "warmup_steps 4": {"warmup_steps": 4},
    "refresh_last_step": {"refresh_last_step": True},
    "no correction": {"correction": False},
}


class Subject(NamedTuple):
    """What is drawn.

    Attributes:
        name: as tables show it.
        model: a recipe of mini-FLUX, or "mini-wan".
        steps, guidance: of each image or clip.
        seeds: one image or clip each.
        tolerances: that are swept.
        qualities: mean PSNR in dB, at which speeds are compared.

    """

    name: str
    model: str
    steps: int
    guidance: float
    seeds: range
    tolerances: tuple[float, ...]
    qualities: tuple[int, int]


_OF_IMAGES: dict[str, Any] = {"seeds": range(16), "tolerances": (0.003, 0.006, 0.012, 0.024, 0.048), "qualities": (45, 40)}
SUBJECTS = (
    Subject("mini-FLUX", "mini-flux", 28, 1.0, **_OF_IMAGES),
    Subject("mini-FLUX, CFG 2", "mini-flux", 28, 2.0, **_OF_IMAGES),
    Subject("strokes", "strokes", 28, 1.0, **_OF_IMAGES),
    Subject("mini-Wan", "mini-wan", 30, 5.0, range(15000, 15016), (0.012, 0.02, 0.032, 0.05), (40, 35)),
)


class Drawn(NamedTuple):
    """A change's curve on a subject.

    Attributes:
        points: one for each tolerance.
        flicker: mean over clips, for each of them; NaN of images.

    """

    points: list[Point]
    flicker: list[float]


def changed(subject: Subject, change: str, tolerance: float) -> afcache.CacheConfig:
    """The presets' settings for a subject at a tolerance, changed."""
    config = resolve_config(tolerance=tolerance, draws_videos=_is_video(subject))
    return dataclasses.replace(config, **CHANGES[change])


def is_none(subject: Subject, change: str) -> bool:
    """Whether a change is what a subject's presets have."""
    return changed(subject, change, 0.01) == changed(subject, PRESETS, 0.01)


def uncached(subject: Subject) -> list[np.ndarray]:
    """What every change is compared with."""
    torch.set_num_threads(1)
    return _images(_load(subject), subject)


def draw(job: tuple[Subject, str, list[np.ndarray]]) -> Drawn:
    """All tolerances of a change."""
    torch.set_num_threads(1)
    subject, change, expected = job
    pipe, points, flicker = _load(subject), [], []
    for tolerance in subject.tolerances:
        afcache.compile_pipeline(pipe, changed(subject, change, tolerance), compile=False)
        computed: list[float] = []
        drawn = _images(pipe, subject, computed)
        afcache.restore_pipeline(pipe)
        pairs = list(zip(drawn, expected, strict=True))
        psnr = tuple(min(afcache.psnr(ours, theirs), 150.0) for ours, theirs in pairs)
        points.append(Point(subject.steps / statistics.mean(computed), psnr))
        flicker.append(
            statistics.mean(afcache.clip_quality(*pair).flicker for pair in pairs) if _is_video(subject) else math.nan
        )
    return Drawn(points, flicker)


def _is_video(subject: Subject) -> bool:
    return subject.model == "mini-wan"


def _load(subject: Subject) -> Any:
    return clips.load() if _is_video(subject) else sampling.load(RECIPES[subject.model])


def _images(pipe: Any, subject: Subject, computed: list[float] | None = None) -> list[np.ndarray]:
    """One image, or clip, of every seed; into `computed`, how many steps of each were."""

    def count() -> None:
        if computed is not None:
            computed.extend(_computed(pipe))

    if _is_video(subject):
        found = []
        for seed in subject.seeds:
            found.append(clips.draw(pipe, seed, steps=subject.steps, guidance_scale=subject.guidance))
            count()
        return found
    recipe, seeds = RECIPES[subject.model], list(subject.seeds)
    guided = {"true_cfg_scale": subject.guidance, "negative_prompt": [""] * len(seeds)} if subject.guidance > 1 else {}
    images = pipe(
        [recipe.prompt_of(seed) for seed in seeds],
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=subject.steps,
        output_type="np",
        **sampling.settings_of(recipe),
        **guided,
    ).images
    count()
    return list(images)


def _computed(pipe: Any) -> list[int]:
    """How many steps of each sample were computed."""
    leaders = [step.refreshed for step in afcache.report(pipe).steps if step.branch == 0]
    return [sum(column) for column in zip(*leaders, strict=True)]


def compared(subjects: Sequence[Subject], drawn: dict[tuple[str, str], Drawn]) -> list[dict[str, Any]]:
    """A row for each change: its speed over the presets', at each quality of each subject."""
    rows = []
    for change in dict.fromkeys(change for _, change in drawn):
        row: dict[str, Any] = {"change": change}
        gains: dict[bool, list[float]] = {True: [], False: []}
        for subject in subjects:
            own, base = drawn[subject.name, change], drawn[subject.name, PRESETS]
            for quality in subject.qualities:
                gain = speed_at(own.points, quality) / speed_at(base.points, quality)
                row[f"{subject.name}, {quality} dB"] = gain
                gains[_is_video(subject)].append(gain)
            if _is_video(subject):
                row["flicker, 35 dB"] = _at(own, speed_at(own.points, 35))
        means = {name: statistics.geometric_mean(gains[kind]) for name, kind in _KINDS.items() if gains[kind]}
        rows.append(row | means)
    return sorted(rows, key=lambda row: -math.prod(row[name] for name in _KINDS if name in row))


def _at(drawn: Drawn, speed: float) -> float:
    pairs = sorted(zip((point.speed for point in drawn.points), drawn.flicker, strict=True))
    return float(np.interp(speed, [found for found, _ in pairs], [flicker for _, flicker in pairs]))


def main() -> None:
    """Draw, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(_KINDS), help="of these subjects alone")
    parser.add_argument("--few", action="store_true", help="two seeds and one change")
    parser.add_argument("--processes", type=int, default=2, help="changes at a time, each on one thread (default 2)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the table")
    arguments = parser.parse_args()
    subjects = [subject._replace(seeds=subject.seeds[:2]) if arguments.few else subject for subject in SUBJECTS]
    subjects = [subject for subject in subjects if arguments.only is None or _is_video(subject) == _KINDS[arguments.only]]
    chosen = list(CHANGES)[:2] if arguments.few else list(CHANGES)
    # Videos take longest, and are begun first.
    last_first = subjects[::-1]
    drawn: dict[tuple[str, str], Drawn] = {}
    with multiprocessing.get_context("forkserver").Pool(arguments.processes, maxtasksperchild=1) as pool:
        expected = dict(zip((subject.name for subject in last_first), pool.imap(uncached, last_first), strict=True))
        jobs = [
            (subject, change, expected[subject.name])
            for subject in last_first
            for change in chosen
            if change == PRESETS or not is_none(subject, change)
        ]
        for (subject, change, _), found in zip(jobs, pool.imap(draw, jobs), strict=True):
            drawn[subject.name, change] = found
            print(subject.name, change, *(f"{point.speed:.2f}x {point.mean:.1f} dB" for point in found.points), flush=True)
    for subject in subjects:
        drawn |= {(subject.name, change): drawn[subject.name, PRESETS] for change in chosen if is_none(subject, change)}
    rows = compared(subjects, drawn)
    notes = [
        "Block evaluations at equal mean PSNR, over those of the presets' rule: above 1 the change is faster. The tolerance is "
        "swept, growth limit and damping follow it. The last columns are geometric means. Flicker is that at 35 dB.",
        *(
            f"{subject.name}: {subject.steps} steps, guidance {subject.guidance:g}, seeds {subject.seeds.start} to "
            f"{subject.seeds.stop - 1}, tolerances {subject.tolerances}."
            for subject in subjects
        ),
        "",
    ]
    print(table(rows))
    title, part = "Each setting of the presets changed alone", arguments.only or ""
    print(write_result("search_changes", title, rows, notes=notes, part=part, folder=arguments.output))


if __name__ == "__main__":
    main()
