"""Every policy over a grid of its knob on mini-FLUX: speed against quality, and the founding claim put to the test.

    python -m bench.compare_strategies              # hours of one core; stop and start again at will
    python -m bench.compare_strategies --settings 2 3   # some of its four settings, to share the work among processes
    python -m bench.compare_strategies --quick      # 16 seeds, one setting, few values, in three minutes

Seeds 1000 and up: other than those of the search, but looked at before; `search_policy report` repeats what matters most on
seeds that were not. Every evaluation is one line of bench/results/evaluations_cpu_202611.jsonl; those found there are not run
again. Delete the file after a change of the library's mathematics.
"""

import argparse
import dataclasses
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

import afcache
from afcache import CacheConfig, policy
from afcache.settings.presets import resolve_config
from bench.mini_flux import sampling
from bench.record.recording import RESULTS, table, write_result
from bench.search.curves import Point, speed_at, worst_at
from bench.search.laboratory import Laboratory, Setting

SETTINGS = (Setting(28, 1.0), Setting(50, 1.0), Setting(28, 2.0), Setting(50, 2.0))
QUALITIES = (45, 40, 35, 30)
SUBJECT = "strategies"


class Family(NamedTuple):
    """A policy and the values of its knob.

    Attributes:
        name: as tables show it.
        kind: "ours", "single" (one strategy), "corrected" (one strategy with our correction), or "control".
        configs: one for each value, from careful to bold.

    """

    name: str
    kind: str
    configs: tuple[CacheConfig, ...]


def _knobs(steps: int) -> dict[str, list[dict[str, Any]]]:
    """Each single-strategy policy's settings, from careful to bold. Those of a fixed schedule know the number of steps."""
    ratios = MINI_FLUX_RATIOS
    intervals = [
        {"interval": n, "warmup_steps": w} for w in (2, 3) for n in (range(2, 9) if steps < 40 else (3, 4, 5, 6, 7, 8, 10, 12))
    ]
    return {
        "taylorseer": intervals,
        "fixed": intervals,
        "fbcache": [{"threshold": t} for t in (0.05, 0.1, 0.2, 0.3, 0.45)],
        "dbcache": [
            {"threshold": t, "first_blocks": f, "warmup_steps": 4, "order": 1, "forecast": "taylorseer"}
            for f, t in ((1, 0.08), (1, 0.16), (1, 0.3), (1, 0.6), (4, 0.1), (4, 0.2), (4, 0.4))
        ],
        "teacache": [{"threshold": t} for t in (0.25, 0.4, 0.6, 0.8, 1.2)],
        "magcache": [
            {"threshold": t, "max_cached_steps": k, "magnitude_ratios": ratios}
            for t, k in ((0.03, 2), (0.06, 3), (0.12, 4), (0.24, 5), (0.4, 8))
        ],
        "spectrum": [{"interval_growth": a} for a in (0.5, 0.75, 1.5, 3.0)],
        "similarity": [{"similarity_threshold": t} for t in (0.001, 0.003, 0.01, 0.03)],
        "attention": [{"attention_threshold": t} for t in (0.01, 0.03, 0.06, 0.1)],
        "difference": [{"difference_threshold": t} for t in (0.05, 0.1, 0.2, 0.3)],
    }


# afcache.calibrate_magnitudes(pipe, ten prompts, num_inference_steps=28), by `python -m bench.compare_strategies --calibrate`.
MINI_FLUX_RATIOS = (
    1.0, 0.9788, 0.9811, 0.9851, 0.9892, 0.99, 0.9868, 0.9827, 0.9794, 0.9769, 0.9745, 0.9728, 0.9724, 0.973,
    0.9731, 0.9724, 0.9716, 0.9712, 0.9706, 0.9699, 0.9702, 0.9698, 0.9668, 0.9647, 0.9617, 0.9549, 0.9447, 0.9345,
)  # fmt: skip


def families(steps: int) -> list[Family]:
    """All policies that are compared."""
    adaptive = tuple(resolve_config(tolerance=t) for t in (0.002, 0.004, 0.008, 0.016, 0.03, 0.06, 0.12))
    grouped = tuple(policy("layerwise", tolerance=t, groups=g) for g in (4,) for t in (0.002, 0.004, 0.008, 0.016, 0.03))
    result = [Family("AFCache, default", "ours", adaptive), Family("AFCache, 4 groups by stability", "ours", grouped)]
    for name, values in _knobs(steps).items():
        plain = tuple(policy(name, **value) for value in values)
        result.append(Family(name, "single", plain))
        result.append(Family(f"{name} + correction", "corrected", tuple(_corrected(config) for config in plain)))
    return [*result, Family("random steps", "control", _random(steps)), Family("first steps", "control", _front(steps))]


def _corrected(config: CacheConfig) -> CacheConfig:
    return dataclasses.replace(config, correction=True)


def _random(steps: int) -> tuple[CacheConfig, ...]:
    """The default's forecast and correction, refreshed at random steps after the warmup."""
    draw = random.Random(0)
    return tuple(_planned(sorted(draw.sample(range(2, steps), round(steps / speed) - 2))) for speed in (2.0, 2.5, 3.0, 4.0))


def _front(steps: int) -> tuple[CacheConfig, ...]:
    """The same, with all refreshes at the start."""
    return tuple(_planned(range(2, round(steps / speed))) for speed in (1.3, 1.6, 2.0, 3.0))


def _planned(steps: Sequence[int]) -> CacheConfig:
    base = resolve_config()
    return dataclasses.replace(base, policy="planned", refresh_steps=tuple(steps), max_growth=2.0)


class Curve(NamedTuple):
    """A family's points in one setting, slowest first.

    Speed counts operations in the blocks: the same as block evaluations where blocks run whole, and fair to what reuses
    attention outputs alone.
    """

    setting: Setting
    family: Family
    points: list[Point]


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


def interpolated(curves: list[Curve]) -> list[dict[str, Any]]:
    """One row for each family and setting: its speed at each quality; empty where the curve does not reach it."""
    return [
        {
            "setting": str(curve.setting),
            "policy": curve.family.name,
            **{f"speed at {quality} dB": _speed(curve.points, quality) for quality in QUALITIES},
            "worst at 40 dB": worst_at(curve.points, speed_at(curve.points, 40)) if _reaches(curve.points, 40) else "-",
        }
        for curve in curves
    ]


def _reaches(points: list[Point], quality: float) -> bool:
    return points[0].mean >= quality


def _speed(points: list[Point], quality: float) -> float | str:
    """Interpolated; "-" where even the slowest point is worse, "> x" where even the fastest is better."""
    if not _reaches(points, quality):
        return "-"
    speed = speed_at(points, quality)
    return f"> {speed:.2f}" if points[-1].mean > quality else speed


def claim(curves: list[Curve]) -> list[dict[str, Any]]:
    """The founding claim, row by row: the default against the best single strategy, without and with our correction."""
    rows = []
    for setting in dict.fromkeys(curve.setting for curve in curves):
        for quality in (40, 35):
            here = [curve for curve in curves if curve.setting == setting]
            ours = next(curve for curve in here if curve.family.name == "AFCache, default")
            best = {kind: _best(here, kind, quality) for kind in ("single", "corrected")}
            speed = speed_at(ours.points, quality)
            rows.append(
                {
                    "setting": str(setting),
                    "PSNR (dB)": quality,
                    "adaptive default": speed,
                    "best single strategy": best["single"][0],
                    "which": best["single"][1],
                    "ratio (claim: 1.2)": speed / best["single"][0],
                    "best with our correction": best["corrected"][0],
                    "which one": best["corrected"][1],
                    "ratio (claim: 1)": speed / best["corrected"][0],
                }
            )
    return rows


def _best(curves: list[Curve], kind: str, quality: float) -> tuple[float, str]:
    reached = [(speed_at(c.points, quality), c) for c in curves if c.family.kind == kind]
    speed, curve = max(reached, key=lambda pair: pair[0])
    ends_above = curve.points[-1].mean > quality
    return speed, curve.family.name + (" (its fastest)" if ends_above else "")


def points_table(curves: list[Curve]) -> list[dict[str, Any]]:
    """Every point on every curve."""
    return [
        {
            "setting": str(curve.setting),
            "policy": curve.family.name,
            "fewer operations": point.speed,
            "fewer block evaluations": point.blocks,
            "PSNR mean": point.mean,
            "10th percentile": point.tenth,
            "worst": point.worst,
            "SSIM": point.ssim,
            "accuracy": point.accuracy,
        }
        for curve in curves
        for point in curve.points
    ]


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
            started = time.perf_counter()
            sampling.draw(pipe, 1000)
            seconds[name].append(time.perf_counter() - started)
            if name != "uncached":
                speeds[name] = afcache.report(pipe).block_speedup
                afcache.restore_pipeline(pipe)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "policy": name,
            "fewer block evaluations": speeds[name],
            "seconds": medians[name],
            "spread": f"{min(values):.3f} to {max(values):.3f}",
            "faster": medians["uncached"] / medians[name],
        }
        for name, values in seconds.items()
    ]


def draw_curves(curves: list[Curve], path: Any) -> None:
    """One panel for each setting: mean PSNR against speed, ours on top."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys(curve.setting for curve in curves))
    figure = Figure(figsize=(6 * min(2, len(settings)) + 2.5, 4.2 * ((len(settings) + 1) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots((len(settings) + 1) // 2, min(2, len(settings)), squeeze=False).flat
    colors = colormaps["tab20"]
    names = list(dict.fromkeys(curve.family.name.removesuffix(" + correction") for curve in curves))
    for axes, setting in zip(panels, settings, strict=False):
        for curve in curves:
            if curve.setting != setting:
                continue
            base = curve.family.name.removesuffix(" + correction")
            is_ours = curve.family.kind == "ours"
            axes.plot(
                [point.speed for point in curve.points],
                [point.mean for point in curve.points],
                {"ours": "o-", "single": ".--", "corrected": ".-", "control": "x:"}[curve.family.kind],
                color="black" if base == "AFCache, default" else colors(names.index(base) % 20),
                linewidth=2.2 if is_ours else 1,
                markersize=4,
                label=curve.family.name,
                zorder=3 if is_ours else 2,
            )
        axes.set(title=str(setting), xlabel="times fewer operations in the blocks", ylabel="mean PSNR (dB)")
        axes.set(xlim=(1, 9), ylim=(20, 70))
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=6.5, loc="outside right center")
    figure.savefig(path, dpi=120)


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
    draw_curves(curves, RESULTS / f"{SUBJECT}_cpu_202611.png")
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
        write_result(f"{SUBJECT}_{name}_cpu_202611", title, results[name], notes=[shared])


if __name__ == "__main__":
    main()
