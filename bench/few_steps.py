"""What the presets save of few steps, beside fewer steps, and beside what they would save by the rules of many.

    python -m bench.few_steps

Trained models that are not distilled. Two rules hold for few steps (`afcache.functional.plans`): with fewer than 16 a run of
forecasts may add more, and of ten or fewer the first three are computed. Each row also says what the preset is without them.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import afcache
from afcache.functional import plans
from bench.mini_flux.recipe import RECIPES
from bench.record.recording import write_result
from bench.record.render import table
from bench.record.spread import shown_spread
from bench.search.curves import Point
from bench.search.laboratory import Laboratory
from bench.search.setting import Setting

EQUAL = 150.0


def pooled_psnr(psnr: Sequence[float]) -> float:
    """PSNR of the mean squared error over all images in dB: images that are equal, or nearly, do not lift it."""
    return -10 * math.log10(statistics.mean(10 ** (-each / 10) for each in psnr))


def rows_of(laboratory: Laboratory, before: Laboratory, setting: Setting) -> list[dict[str, Any]]:
    """A row for each preset.

    Args:
        laboratory: draws, and remembers.
        before: remembers what is drawn without the two rules, whose settings are the same.
        setting: how long and how guided.

    """
    configs = list(afcache.PRESETS.values())
    now = laboratory.evaluate_all(configs, setting)
    with mock.patch.multiple(plans, _FEW_STEPS=0, _MANY_STEPS=0):
        then = before.evaluate_all(configs, setting)
    return [
        row_of(laboratory, setting, name, point, other) for name, point, other in zip(afcache.PRESETS, now, then, strict=True)
    ]


def row_of(laboratory: Laboratory, setting: Setting, preset: str, point: Point, before: Point) -> dict[str, Any]:
    """A preset, and as many steps as it computes, the next whole number, computed without a cache."""
    computed = setting.steps / point.speed
    fewer = math.ceil(computed - 1e-9)
    rival = laboratory.fewer_steps(fewer, setting).psnr if 2 <= fewer < setting.steps else None
    return {
        "model": laboratory.recipe.name,
        "steps": setting.steps,
        "true CFG": setting.cfg,
        "preset": preset,
        "computed steps": computed,
        "fewer block evaluations": point.speed,
        "PSNR (dB)": pooled_psnr(point.psnr),
        "median (quartiles)": shown_spread(point.psnr),
        "worst": point.worst,
        "equal images": sum(each >= EQUAL for each in point.psnr),
        "as many steps": fewer,
        "their PSNR (dB)": "-" if rival is None else pooled_psnr(rival),
        "their worst": "-" if rival is None else min(rival),
        "without the rules: computed steps": setting.steps / before.speed,
        "its PSNR (dB)": pooled_psnr(before.psnr),
        "its worst": before.worst,
    }


def main() -> None:
    """Draw, and write bench/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=RECIPES, default=["mini-flux", "strokes"])
    add("--steps", type=int, nargs="+", default=[4, 5, 6, 8, 10, 12])
    add("--cfg", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    add("--seeds", type=int, default=24)
    add("--first-seed", type=int, default=12000)
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models:
            # Nothing is kept: the rules of few steps are no settings, and would not name an evaluation.
            runs = (Path(folder) / f"{model}-{name}.jsonl" for name in ("now", "before"))
            laboratory, before = (Laboratory(seeds, path, recipe=RECIPES[model]) for path in runs)
            for cfg in arguments.cfg:
                for steps in arguments.steps:
                    rows += rows_of(laboratory, before, Setting(steps, cfg))
                    print(table(rows[-3:]), flush=True)
    notes = [
        f"Seeds {seeds.start} to {seeds.stop - 1}, one image each, decided for one by one, float32; PSNR in float64 "
        "against the uncached image of the same seed and steps. Computed steps and block evaluations are means, no wall clock.",
        "PSNR is that of the mean squared error over all images, so that equal ones do not lift it; in medians they count as "
        f"{EQUAL:g} dB.",
        "As many steps: as few as the preset computes on average, rounded up, on the schedule that the pipeline makes of them, "
        "without a cache.",
        "Without the rules: the same preset, with the tolerance and the warmup that it has with many steps.",
    ]
    print(write_result("few_steps", "Few steps: the presets, and fewer steps", rows, notes=notes))


if __name__ == "__main__":
    main()
