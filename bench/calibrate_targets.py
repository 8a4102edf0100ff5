"""Whether calibrated settings meet their target on prompts and seeds that calibration never saw.

    python -m bench.calibrate_targets

Runs eagerly: decisions and images are those of the compiled forward, and wall clock is not what is asked.
"""

import argparse
from typing import Any

import afcache
from bench.mini_flux import sampling
from bench.record.clock import seconds_of
from bench.record.recording import write_result
from bench.record.render import table

TARGETS: list[dict[str, float]] = [
    {"target_speedup": 2.5},
    {"target_speedup": 3.5},
    {"target_speedup": 4.5},
    {"target_psnr": 45.0},
    {"target_psnr": 40.0},
    {"target_psnr": 35.0},
]


def seeds_of(first: int, images: int, *, is_fresh: bool) -> list[int]:
    """Seeds whose prompts are of one half of all prompts: digits and places whose sum is even, or odd."""
    return [seed for seed in range(first, first + 2 * images) if (seed + seed // 10) % 2 == is_fresh]


def measure(
    pipe: Any, target: dict[str, float], *, cfg: float, known: list[int], fresh: list[int], references: dict[int, Any]
) -> dict[str, Any]:
    """One row: a target at one guidance scale."""
    (name, goal), *_ = target.items()
    options: dict[str, Any] = {"true_cfg_scale": cfg, "negative_prompt": ""} if cfg > 1 else {}
    options |= {**target, **sampling.SETTINGS, "progress": False}
    prompts = [sampling.prompt_of(seed) for seed in known]
    config, seconds = seconds_of(lambda: afcache.calibrate(pipe, prompts, **options))
    assert config.calibration is not None
    chosen = next(point for point in config.calibration.curve if point.tolerance == config.tolerance)
    afcache.compile_pipeline(pipe, config, compile=False)
    quality, ran, uncached = [], 0, 0
    for seed in fresh:
        image = sampling.draw(pipe, seed, cfg=cfg)
        quality.append(min(afcache.psnr(image, references[seed]), 150.0))
        run = afcache.report(pipe)
        ran, uncached = ran + run.block_evaluations, uncached + run.block_evaluations_uncached
    afcache.restore_pipeline(pipe)
    speed, psnr = uncached / ran, sum(quality) / len(quality)
    met, there = (speed, chosen.speedup) if name == "target_speedup" else (psnr, chosen.psnr)
    return {
        "true CFG": cfg,
        "target": f"{goal:g}x" if name == "target_speedup" else f"{goal:g} dB",
        "goal": goal,
        "tolerance": config.tolerance,
        "points": len(config.calibration.curve),
        "seconds": seconds,
        "calibrated": there,
        "fresh": met,
        "off by (%)": 100 * (met / goal - 1),
        "fresh speed-up": speed,
        "fresh PSNR (dB)": psnr,
        "fresh worst (dB)": min(quality),
    }


def main() -> None:
    """Measure and write bench/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20, help="that calibration draws, seeds from 0")
    parser.add_argument("--fresh", type=int, default=60, help="images that judge it")
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0, 2.0])
    arguments = parser.parse_args()
    known, fresh = seeds_of(0, arguments.images, is_fresh=False), seeds_of(5000, arguments.fresh, is_fresh=True)
    pipe = sampling.load()
    rows = []
    for cfg in arguments.cfg:
        references = {seed: sampling.draw(pipe, seed, cfg=cfg) for seed in fresh}
        for target in TARGETS:
            rows.append(measure(pipe, target, cfg=cfg, known=known, fresh=fresh, references=references))
            print(rows[-1], flush=True)
    notes = [
        f"mini-FLUX, 28 steps, float32. Calibrated on {len(known)} images of half of the prompts, judged on "
        f"{len(fresh)} of the other half, other seeds.",
        "Speed counts block evaluations; PSNR in float64 against the uncached image of the same seed.",
    ]
    shown = [{name: value for name, value in row.items() if name != "goal"} for row in rows]
    print(table(shown))
    print(write_result("calibrate", "Calibrated targets on fresh images", rows, notes=notes, shown=shown))


if __name__ == "__main__":
    main()
