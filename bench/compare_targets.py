"""What to forecast on mini-FLUX: residual, velocity or noise, with all else the same and with settings of their own.

    python -m bench.compare_targets            # 64 seeds that no search has seen
    python -m bench.compare_targets --quick    # 4 seeds, writes nothing

Evaluations are kept in bench/runs/evaluations.jsonl (see `bench.search_policy`).
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from afcache import CacheConfig
from afcache.settings.presets import tuned
from bench.record.recording import write_result
from bench.record.render import table
from bench.search.curves import Point, speed_at, worst_at
from bench.search.laboratory import Laboratory, Setting

SEEDS = range(8000, 8064)
SETTINGS = (Setting(28, 1.0), Setting(50, 1.0), Setting(28, 2.0), Setting(50, 2.0))
TOLERANCES = (0.004, 0.008, 0.012, 0.016, 0.024, 0.032, 0.045, 0.064, 0.12, 0.2)
QUALITIES = (45, 40, 36)


def _same(target: Any) -> Callable[[float], CacheConfig]:
    """The default policy's settings with another target."""
    return lambda tolerance: dataclasses.replace(tuned(tolerance), target=target)


VARIANTS: dict[str, Callable[[float], CacheConfig]] = {
    "residual (the default)": tuned,
    "velocity, all else the same": _same("velocity"),
    "noise, all else the same": _same("noise"),
    'policy "velocity"': lambda tolerance: tuned(tolerance, target="velocity"),
    'policy "noise"': lambda tolerance: tuned(tolerance, target="noise"),
}


def _row(setting: Setting, name: str, curve: list[Point], base: list[Point]) -> dict[str, Any]:
    speeds = {quality: speed_at(curve, quality) for quality in QUALITIES}
    ratios = [speed / speed_at(base, quality) for quality, speed in speeds.items()]
    return {
        "setting": str(setting),
        "forecast": name,
        **{f"speed at {quality} dB": speed for quality, speed in speeds.items()},
        "ratio to residual": statistics.geometric_mean(ratios),
        "least ratio": min(ratios),
        "worst image at 40 dB": worst_at(curve, speeds[40]),
    }


def main() -> None:
    """Draw, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 seeds, one setting, two tolerances; writes no results")
    quick = parser.parse_args().quick
    laboratory = Laboratory(SEEDS[:4] if quick else SEEDS)
    rows = []
    for setting in SETTINGS[:1] if quick else SETTINGS:
        curves: dict[str, list[Point]] = {}
        for name, config_at in VARIANTS.items():
            tolerances = TOLERANCES[3:6:2] if quick else TOLERANCES
            curves[name] = sorted(laboratory.evaluate(config_at(tolerance), setting) for tolerance in tolerances)
            rows.append(_row(setting, name, curves[name], next(iter(curves.values()))))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    if quick:
        return
    notes = [
        "Seeds 8000-8063, PSNR against the uncached image of the same seed. Speed: times fewer block evaluations, interpolated "
        f"between tolerances {', '.join(f'{t:g}' for t in TOLERANCES)}; a curve that ends above the asked PSNR counts with its "
        "last speed. Ratio: geometric mean over the three qualities.",
        'With guidance, "residual" bounds the error of the guided velocity by that of both branches; the others measure it.',
    ]
    write_result("targets", "What to forecast: fewer block evaluations at equal PSNR, mini-FLUX", rows, notes=notes)


if __name__ == "__main__":
    main()
