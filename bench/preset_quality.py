"""Speed and quality of the presets on mini-FLUX, and of what they were before: fewer block evaluations against PSNR to the
uncached image.

    python -m bench.preset_quality

Runs eagerly: decisions and images are those of the compiled forward (tests/pipelines/test_pipeline.py), only times are not.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from typing import Any, get_args

import afcache
from afcache import CacheConfig
from afcache.settings.presets import Preset, preset_config
from bench.mini_flux import sampling
from bench.record.recording import write_result
from bench.record.render import table

KINDS: dict[str, Callable[[Preset], CacheConfig]] = {
    "noise": preset_config,
    "residual": lambda preset: preset_config(preset, target="residual"),
}


def measure(pipe: Any, preset: Preset, kind: str, *, steps: int, cfg: float, references: dict[int, Any]) -> dict[str, Any]:
    """One row: a preset at one guidance scale, on the seeds of the references."""
    config = KINDS[kind](preset)
    afcache.compile_pipeline(pipe, config, compile=False)
    quality, speed = [], []
    for seed in references:
        image = sampling.draw(pipe, seed, steps=steps, cfg=cfg)
        quality.append(min(afcache.psnr(image, references[seed]), 150.0))
        speed.append(afcache.report(pipe).block_speedup)
    afcache.restore_pipeline(pipe)
    # Block evaluations add up, so the mean speed-up is the harmonic one.
    return {
        "preset": preset,
        "forecast": kind,
        "tolerance": config.tolerance,
        "steps": steps,
        "true CFG": cfg,
        "fewer block evaluations": statistics.harmonic_mean(speed),
        "PSNR mean (dB)": statistics.mean(quality),
        "PSNR worst (dB)": min(quality),
        "PSNR spread (dB, s.d.)": statistics.stdev(quality),
    }


def main() -> None:
    """Measure and write bench/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--first-seed", type=int, default=12000)
    parser.add_argument("--steps", type=int, nargs="+", default=[28])
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    arguments = parser.parse_args()
    pipe = sampling.load()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    rows = []
    for steps in arguments.steps:
        for cfg in arguments.cfg:
            references = {seed: sampling.draw(pipe, seed, steps=steps, cfg=cfg) for seed in seeds}
            for kind, preset in itertools.product(KINDS, get_args(Preset)):
                rows.append(measure(pipe, preset, kind, steps=steps, cfg=cfg, references=references))
                print(rows[-1], flush=True)
    notes = [
        f"Seeds {seeds.start} to {seeds.stop - 1}, one image each, batch 1, float32; PSNR in float64 against the "
        "uncached image of the same seed.",
        "Speed counts block evaluations that really ran (harmonic mean over seeds); it is no wall clock.",
    ]
    print(table(rows))
    print(write_result("presets", "Presets on mini-FLUX", rows, notes=notes))


if __name__ == "__main__":
    main()
