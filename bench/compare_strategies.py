"""Every policy over a grid of its knob on mini-FLUX: speed against quality, and the founding claim put to the test.

    python -m bench.compare_strategies              # hours of one core; stop and start again at will
    python -m bench.compare_strategies --settings 2 3   # some of its four settings, to share the work among processes
    python -m bench.compare_strategies --quick      # 16 seeds, one setting, few values, in three minutes

Seeds 1000 and up: other than those of the search, but looked at before; `search_policy report` repeats what matters most on
seeds that were not. Every evaluation is one line of bench/runs/evaluations.jsonl, a cache that git ignores; those found there
are not run again. Delete the file after a change of the library's mathematics.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

import afcache
from bench.mini_flux import sampling
from bench.record.clock import seconds_of
from bench.record.naming import result_path
from bench.record.recording import write_result
from bench.record.render import table
from bench.record.spread import spread_of
from bench.search.curves import Point
from bench.search.families import Family, families
from bench.search.laboratory import Laboratory
from bench.search.setting import Setting
from bench.search.strategies import Curve, claim, draw_curves, interpolated, points_table

SETTINGS = (Setting(28, 1.0), Setting(50, 1.0), Setting(28, 2.0), Setting(50, 2.0))
SUBJECT = "strategies"


def measure(laboratory: Laboratory, settings: Sequence[Setting], *, quick: bool) -> Iterator[Curve]:
    """Evaluate everything that is not known yet."""
    jobs = [(setting, _thin(family, quick=quick)) for setting in settings for family in families(setting.steps)]
    total = sum(len(family.configs) for _, family in jobs)
    with tqdm(total=total, unit="evaluation") as bar:
        for setting, family in jobs:
            points = []
            for config in family.configs:
                bar.set_description(f"{setting}, {family.name}")
                points.append(_by_operations(laboratory.evaluate(config, setting)))
                bar.update()
            yield Curve(setting, family, _frontier(points))
    for setting in settings:
        counts = [round(setting.steps / speed) for speed in (1.5, 2.0, 3.0, 4.0)]
        points = [laboratory.fewer_steps(count, setting) for count in counts]
        yield Curve(setting, Family("fewer steps", "control", ()), sorted(points))


def _thin(family: Family, *, quick: bool) -> Family:
    """A quick run takes three values of each knob."""
    if not quick or len(family.configs) <= 3:
        return family
    last = len(family.configs) - 1
    return family._replace(configs=tuple(family.configs[i] for i in (last // 3, last // 2, 2 * last // 3)))


def _by_operations(point: Point) -> Point:
    return point._replace(speed=point.flops, blocks=point.speed)


def _frontier(points: list[Point]) -> list[Point]:
    """Points that no other beats in both speed and mean PSNR: what the best choice of a family's knobs gives."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.speed, -p.mean)):
        if not best or point.mean > best[-1].mean:
            best.append(point)
    return sorted(best)


def wall_clock(rounds: int, *, quick: bool) -> list[dict[str, Any]]:
    """Seconds of one image through the pipeline, nothing compiled, at each policy's middle knob; in alternation."""
    pipe = sampling.load()
    chosen = {family.name: family.configs[len(family.configs) // 2] for family in families(28) if family.kind != "control"}
    if quick:
        chosen = dict(list(chosen.items())[:4])
    seconds: dict[str, list[float]] = {"uncached": [], **{name: [] for name in chosen}}
    speeds = dict.fromkeys(seconds, 1.0)
    for _ in range(rounds):
        for name in seconds:
            if name != "uncached":
                afcache.compile_pipeline(pipe, chosen[name], compile=False)
            seconds[name].append(seconds_of(lambda: sampling.draw(pipe, 1000))[1])
            if name != "uncached":
                speeds[name] = afcache.report(pipe).block_speedup
                afcache.restore_pipeline(pipe)
    spreads = {name: spread_of(values) for name, values in seconds.items()}
    return [
        {
            "policy": name,
            "fewer block evaluations": speeds[name],
            "seconds": spread.median,
            "spread": f"{spread.low:.3f} to {spread.high:.3f}",
            "faster": spreads["uncached"].median / spread.median,
        }
        for name, spread in spreads.items()
    ]


def main() -> None:
    """Measure, print, and write bench/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 seeds, one setting, three values a knob; writes no results")
    parser.add_argument("--settings", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3], help="all by default")
    parser.add_argument("--calibrate", action="store_true", help="print MagCache's ratios for mini-FLUX, and stop")
    arguments = parser.parse_args()
    if arguments.calibrate:
        pipe = sampling.load()
        prompts = [sampling.prompt_of(seed) for seed in range(10)]
        print([round(r, 4) for r in afcache.calibrate_magnitudes(pipe, prompts, num_inference_steps=28, **sampling.SETTINGS)])
        return
    seeds = range(1000, 1016) if arguments.quick else range(1000, 1064)
    settings = SETTINGS[:1] if arguments.quick else [SETTINGS[i] for i in arguments.settings]
    curves = list(measure(Laboratory(seeds), settings, quick=arguments.quick))
    results = {"speed": interpolated(curves), "claim": claim(curves), "points": points_table(curves)}
    results["wall"] = wall_clock(1 if arguments.quick else 5, quick=arguments.quick)
    for name in ("speed", "wall", "claim"):
        print(table(results[name]), end="\n\n")
    if arguments.quick:
        return
    draw_curves(curves, result_path(SUBJECT, ".png"))
    shared = (
        "mini-FLUX, seeds 1000-1063, PSNR (float64) against the uncached image of the same seed. Each policy's curve holds the "
        "points of its knobs' grid that no other point beats. Speed: how many times fewer operations the blocks took, the same "
        "as fewer block evaluations wherever blocks run whole (those count blocks whose MLPs alone ran in full). Speeds at "
        "equal PSNR are interpolated between points; '-': not reached; a curve that ends above the asked PSNR counts with its "
        "last speed."
    )
    titles = {
        "speed": "Policies at equal quality: times fewer operations in the blocks",
        "claim": "The founding claim: the adaptive default against the best single strategy",
        "points": "Policies: every point of every curve",
        "wall": "Policies: seconds of one image through the pipeline, nothing compiled",
    }
    for name, title in titles.items():
        write_result(f"{SUBJECT}_{name}", title, results[name], notes=[shared])


if __name__ == "__main__":
    main()
