"""What to forecast: residual, velocity or noise, with all else the same and with settings of their own, on trained models.

    python -m bench.compare_targets                                 # mini-FLUX, 64 seeds that no search has seen
    python -m bench.compare_targets --models textures --device cuda # the model that is kept aside
    python -m bench.compare_targets --quick                         # 4 seeds, writes nothing

Beside them stand diffusers' own TaylorSeer in its lite mode, the better of two warmups at each quality, and fewer steps.
Evaluations are kept in --runs, and not made again; processes may share them out by --part, and one more writes the tables.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from afcache import CacheConfig
from afcache.settings.presets import tuned
from bench.mini_flux.recipe import RECIPES
from bench.record.naming import RESULTS
from bench.record.recording import write_result
from bench.record.render import table
from bench.search.curves import Point, speed_at, worst_at
from bench.search.laboratory import KNOWN, Laboratory
from bench.search.setting import Setting

SEEDS = range(9000, 9064)
SETTINGS = (Setting(28, 1.0), Setting(50, 1.0), Setting(28, 2.0), Setting(50, 2.0))
TOLERANCES = (0.004, 0.008, 0.012, 0.016, 0.024, 0.032, 0.045, 0.064, 0.12, 0.2)
QUALITIES = (45, 40, 36)
INTERVALS, WARMUPS = range(2, 9), (2, 3)
TAYLORSEER, FEWER = "diffusers TaylorSeer lite", "fewer steps"


def _same(target: Any) -> Callable[[float], CacheConfig]:
    """The old default's settings with another target."""
    return lambda tolerance: dataclasses.replace(tuned(tolerance, target="residual"), target=target)


VARIANTS: dict[str, Callable[[float], CacheConfig]] = {
    "residual": lambda tolerance: tuned(tolerance, target="residual"),
    "velocity, all else the same": _same("velocity"),
    "noise, all else the same": _same("noise"),
    'policy "velocity"': lambda tolerance: tuned(tolerance, target="velocity"),
    'policy "noise"': lambda tolerance: tuned(tolerance, target="noise"),
}


def curves_of(laboratory: Laboratory, setting: Setting, *, quick: bool = False) -> dict[str, list[list[Point]]]:
    """The curves of every contender: one, or for TaylorSeer one for each warmup."""
    tolerances = TOLERANCES[3:6:2] if quick else TOLERANCES
    curves = {
        name: [sorted(laboratory.evaluate_all([config_at(tolerance) for tolerance in tolerances], setting))]
        for name, config_at in VARIANTS.items()
    }
    intervals = INTERVALS[1:3] if quick else INTERVALS
    curves[TAYLORSEER] = [sorted(laboratory.taylorseer_lite(n, w, setting) for n in intervals) for w in WARMUPS]
    fewer = sorted({round(setting.steps / n) for n in intervals}, reverse=True)
    curves[FEWER] = [[laboratory.fewer_steps(steps, setting) for steps in fewer]]
    return curves


def rows_of(model: str, setting: Setting, curves: dict[str, list[list[Point]]]) -> list[dict[str, Any]]:
    """A row for each contender."""
    speeds = {name: {q: max(speed_at(curve, q) for curve in own) for q in QUALITIES} for name, own in curves.items()}

    def ratios(name: str, base: str) -> list[float]:
        return [speeds[name][quality] / speeds[base][quality] for quality in QUALITIES]

    def worst(own: list[list[Point]]) -> float:
        curve = max(own, key=lambda curve: speed_at(curve, 40))
        return worst_at(curve, speed_at(curve, 40))

    return [
        {
            "model": model,
            "setting": str(setting),
            "contender": name,
            **{f"speed at {quality} dB": speed for quality, speed in speeds[name].items()},
            "ratio to residual": statistics.geometric_mean(ratios(name, "residual")),
            "least ratio": min(ratios(name, "residual")),
            "ratio to TaylorSeer lite": statistics.geometric_mean(ratios(name, TAYLORSEER)),
            "least ratio to it": min(ratios(name, TAYLORSEER)),
            "worst image at 40 dB": worst(own),
        }
        for name, own in curves.items()
    ]


def means_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over settings, for each model and contender."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["contender"]), []).append(row)
    return [
        {
            "model": model,
            "contender": contender,
            "settings": len(some),
            "ratio to residual": statistics.geometric_mean(row["ratio to residual"] for row in some),
            "least ratio": min(row["least ratio"] for row in some),
            "ratio to TaylorSeer lite": statistics.geometric_mean(row["ratio to TaylorSeer lite"] for row in some),
            "least ratio to it": min(row["least ratio to it"] for row in some),
        }
        for (model, contender), some in groups.items()
    ]


def main() -> None:
    """Draw, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="4 seeds, one setting, two tolerances; writes no results")
    add("--models", nargs="*", choices=RECIPES, default=["mini-flux"])
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--runs", type=Path, nargs="*", default=[KNOWN], help="files of evaluations; new ones go to the first")
    add("--output", type=Path, default=RESULTS, help="folder of the tables")
    add("--part", type=int, nargs=2, metavar=("I", "N"), help="draw one in N settings and write no tables")
    arguments = parser.parse_args()
    quick, device = arguments.quick, arguments.device
    places = [(model, setting) for model in arguments.models for setting in (SETTINGS[:1] if quick else SETTINGS)]
    if arguments.part:
        places = places[arguments.part[0] :: arguments.part[1]]
    runs, *more = arguments.runs
    seeds = SEEDS[:4] if quick else SEEDS
    laboratories = {model: Laboratory(seeds, runs, more=more, recipe=RECIPES[model], device=device) for model in dict(places)}
    rows = []
    for model, setting in places:
        rows += rows_of(model, setting, curves_of(laboratories[model], setting, quick=quick))
        print(table(rows[-len(VARIANTS) - 2 :]), flush=True)
    means = means_of(rows)
    print(table(means))
    if quick or arguments.part:
        return
    notes = [
        f"Seeds {SEEDS[0]}-{SEEDS[-1]}, PSNR against the uncached image of the same seed. Speed: times fewer block "
        f"evaluations, interpolated between tolerances {', '.join(f'{t:g}' for t in TOLERANCES)}; a curve that ends above "
        "the asked PSNR counts with its last speed. Ratios: geometric means over the three qualities, and the least of them.",
        "TaylorSeer lite: diffusers' own code, intervals 2 to 8, in float32, after two or three steps in full, whichever is "
        "faster at the quality.",
        'With guidance, "residual" bounds the error of the guided velocity by that of both branches; the others measure it.',
        "",
        table(means),
    ]
    title = "What to forecast: fewer block evaluations at equal PSNR"
    write_result("targets", title, rows, notes=notes, device=device, folder=arguments.output)


if __name__ == "__main__":
    main()
