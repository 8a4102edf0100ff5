"""Which policy is best on mini-FLUX? A resumable search on seeds 0 to 63, and a report on seeds 2000 to 2063.

    python -m bench.search_policy search            # about an hour of one core; stop and start again at will
    python -m bench.search_policy report            # speed against quality of the frozen presets, and of TaylorSeer
    python -m bench.search_policy search --quick    # the same on 4 seeds and few variants, in a minute

Every evaluation is one line of bench/runs/evaluations.jsonl, a cache that git ignores; those found there are not run again.
Delete the file after a change of the library's mathematics.
"""

import argparse
import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from afcache import CacheConfig
from afcache.settings.presets import preset_config, tuned
from bench.record.figure import new_figure
from bench.record.naming import result_path
from bench.record.recording import write_result
from bench.record.render import table
from bench.search.curves import Point, speed_at, worst_at
from bench.search.laboratory import Laboratory
from bench.search.setting import Setting

TOLERANCES = (0.004, 0.008, 0.016, 0.03, 0.06)
BOLD_TOLERANCES = (0.016, 0.03, 0.06, 0.12)
BASE = CacheConfig(warmup_steps=2, error_exponent=1.0, damping=0.2, max_growth=1.5)
# TaylorSeer as its authors publish it, on the residual of the whole stack: the strongest peer.
TAYLORSEER = CacheConfig(policy="fixed", forecast="taylorseer", correction=False, warmup_steps=3)


class Variant(NamedTuple):
    """A policy whose tolerance (or interval) is swept; with `is_tuned` the other settings follow, as the presets' do."""

    name: str
    config: CacheConfig
    use_surprise: bool = False
    is_unguided: bool = False
    is_tuned: bool = False


SETTINGS = (Setting(28, 1.0), Setting(50, 1.0), Setting(28, 2.0), Setting(50, 2.0))


def single_changes() -> list[Variant]:
    """The base, and each of its settings changed alone."""
    changes: dict[str, dict[str, Any]] = {
        "base": {},
        **{f"growth limit {value:g}": {"max_growth": value} for value in (1.25, 1.7, 2.0, 3.0, math.inf)},
        **{f"damping {value:g}": {"damping": value} for value in (0.0, 0.1, 0.3, 0.5)},
        **{f"exponent {value:g}": {"error_exponent": value} for value in (0.5, 1.5, 2.0)},
        "remainder law": {"error_law": "remainder"},
        "warmup 3": {"warmup_steps": 3},
        "last step refreshed": {"refresh_last_step": True},
        "no correction": {"correction": False},
        "order 0": {"order": 0, "damping": 0.0},
        "order 2": {"order": 2},
    }
    variants = [Variant(name, dataclasses.replace(BASE, **change)) for name, change in changes.items()]
    # Guided decisions would need a signal for each branch.
    unguided = [
        Variant("base, CFG 1 alone", BASE, is_unguided=True),
        Variant("surprise, CFG 1 alone", BASE, is_unguided=True, use_surprise=True),
    ]
    return variants + unguided


def combinations() -> list[Variant]:
    """The settings that matter, together."""
    return [
        Variant(
            f"growth limit {growth:g}, damping {damping:g}, exponent {exponent:g}",
            dataclasses.replace(BASE, max_growth=growth, damping=damping, error_exponent=exponent),
        )
        for growth, damping, exponent in itertools.product((1.4, 1.5, 1.6, 1.8, 2.0), (0.1, 0.2, 0.3), (1.0, 1.5))
    ]


def careful() -> list[Variant]:
    """What might spare the worst seeds: more history before the first forecast."""
    return [
        Variant("growth limit 1.5, damping 0.2, exponent 1, warmup 3", dataclasses.replace(BASE, warmup_steps=3)),
        Variant(
            "growth limit 1.4, damping 0.2, exponent 1, warmup 3", dataclasses.replace(BASE, warmup_steps=3, max_growth=1.4)
        ),
    ]


def bold() -> list[Variant]:
    """Candidates for 35 dB, where the presets' growth limit ends before the quality does."""
    return [
        Variant(
            f"growth limit {growth:g}, damping {damping:g}",
            dataclasses.replace(BASE, max_growth=growth, damping=damping),
        )
        for growth, damping in itertools.product((1.5, 2.0, 2.5, 3.0), (0.2, 0.35, 0.5))
    ]


def swept(config: CacheConfig, value: float) -> CacheConfig:
    """The config with another value of its knob: the interval under a fixed policy, else the tolerance."""
    if config.policy == "fixed":
        return dataclasses.replace(config, interval=int(value))
    return dataclasses.replace(config, tolerance=value)


def _curve(laboratory: Laboratory, variant: Variant, setting: Setting, values: Iterable[float]) -> list[Point]:
    """Points of rising speed, over tolerances or, under a fixed policy, intervals."""
    configs = [tuned(value, target="residual") if variant.is_tuned else swept(variant.config, value) for value in values]
    return sorted(laboratory.evaluate(config, setting, use_surprise=variant.use_surprise) for config in configs)


def score_row(
    laboratory: Laboratory,
    variant: Variant,
    settings: Sequence[Setting],
    tolerances: Sequence[float],
    qualities: Sequence[int] = (50, 45, 40),
) -> dict[str, Any]:
    """A row of the search: geometric means over the settings."""
    curves = [_curve(laboratory, variant, setting, tolerances) for setting in settings]
    speeds = {q: statistics.geometric_mean(speed_at(curve, q) for curve in curves) for q in qualities}
    balanced = [laboratory.evaluate(swept(variant.config, 0.016), s, use_surprise=variant.use_surprise) for s in settings]
    return {
        "variant": variant.name,
        **{f"speed at {quality} dB": value for quality, value in speeds.items()},
        "score": statistics.geometric_mean(speeds.values()),
        "speed at tolerance .016": statistics.geometric_mean(point.speed for point in balanced),
        "PSNR there": statistics.mean(point.mean for point in balanced),
        "worst there": min(point.worst for point in balanced),
    }


def search(*, quick: bool) -> None:
    """Change one setting at a time, then the settings that matter together; write the ranking."""
    settings = SETTINGS[:1] if quick else SETTINGS[:3]
    tolerances = (0.016, 0.03) if quick else TOLERANCES
    screening = Laboratory(range(4) if quick else range(16))
    finals = screening if quick else Laboratory(range(64))
    single = single_changes()[:4] if quick else single_changes()
    joint = combinations()[:2] if quick else combinations()

    def rank(title: str, laboratory: Laboratory, variants: list[Variant], *sweep: Sequence[Any]) -> list[dict[str, Any]]:
        rows = []
        for variant in variants:
            usable = [s for s in settings if s.cfg == 1.0] if variant.is_unguided else settings
            rows.append(score_row(laboratory, variant, usable, *(sweep or (tolerances,))))
            print(f"{title}: {table(rows[-1:]).splitlines()[-1]}", flush=True)
        return sorted(rows, key=lambda row: -row["score"])

    first = rank("one change", screening, single)
    screened = rank("together", screening, joint)
    names = {row["variant"] for row in screened[: 2 if quick else 5]}
    last = rank("finals", finals, [variant for variant in joint if variant.name in names] + careful())
    boldest = rank("bold", screening, bold()[:2] if quick else bold(), BOLD_TOLERANCES, (40, 35))
    rows = [
        {"round": name, **row}
        for name, part in (("one change", first), ("together", screened), ("finals", last))
        for row in part
    ]
    print(table(rows))
    print(table(boldest))
    if not quick:
        write_result(
            "policy_search_bold",
            "Search for a policy at 35 dB: fewer block evaluations at equal PSNR, mini-FLUX",
            boldest,
            notes=[
                "Seeds 0-15; geometric means over 28 and 50 steps at CFG 1 and 28 steps at CFG 2. Speeds are interpolated "
                f"between tolerances {', '.join(f'{t:g}' for t in BOLD_TOLERANCES)}; a variant that is still better than "
                "asked at its fastest counts with that speed.",
                f"Base: {BASE}",
            ],
        )
        write_result(
            "policy_search",
            "Search for the policy: fewer block evaluations at equal PSNR, mini-FLUX",
            rows,
            notes=[
                "One change and combinations: seeds 0-15; finals: seeds 0-63. Geometric means over 28 and 50 steps at CFG 1 "
                "and 28 steps at CFG 2; the surprise signal, and the base beside it, at CFG 1 alone.",
                f"Speeds are interpolated between tolerances {', '.join(f'{t:g}' for t in tolerances)}; a variant that is "
                "still better than asked at its fastest counts with that speed. Score: geometric mean of the three speeds.",
                f"Base: {BASE}",
            ],
        )


def report(*, quick: bool) -> None:
    """Curves of the presets and of TaylorSeer on fresh seeds."""
    laboratory = Laboratory(range(2000, 2004) if quick else range(2000, 2064))
    settings = SETTINGS[:1] if quick else SETTINGS
    tolerances = (0.016, 0.06) if quick else (0.004, 0.008, 0.012, 0.016, 0.024, 0.032, 0.045, 0.064, 0.12)
    intervals = (3, 5) if quick else (2, 3, 4, 5, 6, 7, 8)
    ours = Variant("AFCache", preset_config("balanced", target="residual"), is_tuned=True)
    peers = [
        Variant("TaylorSeer order 1, first 3 steps", TAYLORSEER),
        Variant("TaylorSeer order 1, first 2 steps", dataclasses.replace(TAYLORSEER, warmup_steps=2)),
    ]
    corrected = [Variant(f"{v.name}, our correction", dataclasses.replace(v.config, correction=True)) for v in peers]
    rows, comparison, curves = [], [], {}
    for setting in settings:
        for variant in [ours, *peers, *corrected]:
            curve = _curve(laboratory, variant, setting, tolerances if variant is ours else intervals)
            curves[setting, variant.name] = curve
            rows += [
                {
                    "setting": str(setting),
                    "policy": variant.name,
                    "fewer block evaluations": p.speed,
                    "PSNR mean": p.mean,
                    "worst": p.worst,
                }
                for p in curve
            ]
        for quality in (45, 40, 35):
            comparison.append(_compare(setting, quality, curves, ours, peers, corrected))
    print(table(comparison))
    if quick:
        return
    _plot(curves, settings, result_path("policy_curves", ".png"))
    notes = [
        "Seeds 2000-2063, on which nothing was looked at before, PSNR against the uncached image of the same seed. Speeds at "
        "equal PSNR are interpolated; a curve that ends above the asked PSNR counts with its last speed, on either side.",
        "TaylorSeer: fixed intervals and finite differences in step index as its authors define them (arXiv 2503.06923), but "
        "on the residual of the whole stack, as its lite variants do; the authors forecast every module's output.",
    ]
    write_result("policy_comparison", "AFCache against fixed-interval Taylor at equal quality", comparison, notes=notes)
    write_result("policy_curves", "Speed against quality: every point", rows, notes=notes)


def _compare(
    setting: Setting,
    quality: float,
    curves: dict[tuple[Setting, str], list[Point]],
    variant: Variant,
    peers: list[Variant],
    corrected: list[Variant],
) -> dict[str, Any]:
    """Ours against the better of TaylorSeer's two warmups, at one quality."""
    ours = curves[setting, variant.name]
    theirs = max((curves[setting, variant.name] for variant in peers), key=lambda curve: speed_at(curve, quality))
    speed, peer_speed = speed_at(ours, quality), speed_at(theirs, quality)
    corrected_speed = max(speed_at(curves[setting, variant.name], quality) for variant in corrected)
    return {
        "setting": str(setting),
        "PSNR (dB)": quality,
        "AFCache": speed,
        "TaylorSeer": peer_speed,
        "ratio": speed / peer_speed,
        "AFCache worst seed": worst_at(ours, speed),
        "TaylorSeer worst seed": worst_at(theirs, peer_speed),
        "TaylorSeer with our correction": corrected_speed,
        "ratio to that": speed / corrected_speed,
    }


def _plot(curves: dict[tuple[Setting, str], list[Point]], settings: Sequence[Setting], path: Path) -> None:
    figure = new_figure(9, 7)
    for axes, setting in zip(figure.subplots(2, 2).flat, settings, strict=True):
        for (where, name), curve in curves.items():
            if where == setting:
                (line,) = axes.plot([p.speed for p in curve], [p.mean for p in curve], "o-", markersize=3, label=name)
                axes.plot([p.speed for p in curve], [p.worst for p in curve], ":", color=line.get_color(), linewidth=1)
        axes.set_title(f"{setting} (dotted: worst of 64)", fontsize=9)
        axes.set_xlabel("times fewer block evaluations")
        axes.set_ylabel("PSNR (dB)")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7, loc="lower left")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Search or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["search", "report"])
    parser.add_argument("--quick", action="store_true", help="few seeds and variants; writes no results")
    arguments = parser.parse_args()
    {"search": search, "report": report}[arguments.task](quick=arguments.quick)


if __name__ == "__main__":
    main()
