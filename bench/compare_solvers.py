"""What catching up is worth under solvers that mix several outputs, at equal speed.

    python -m bench.compare_solvers

The presets' policy with and without its correction, seeds that no search has seen, the pipeline itself with each scheduler in
it. Images of a batch decide one by one.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

import afcache
from afcache import CacheConfig
from afcache.calibration.metrics import psnr
from afcache.settings.presets import tuned
from bench.mini_flux import sampling
from bench.record.recording import write_result
from bench.record.render import table
from bench.search.curves import Point

FLOW: dict[str, Any] = {"use_flow_sigmas": True, "use_dynamic_shifting": True, "prediction_type": "flow_prediction"}
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "FlowMatchEuler": lambda config: FlowMatchEulerDiscreteScheduler.from_config(config),
    "DPM++ 2M": lambda config: DPMSolverMultistepScheduler.from_config(config, **FLOW),
    "DPM++ 2S": lambda config: DPMSolverSinglestepScheduler.from_config(config, **FLOW),
    "UniPC": lambda config: UniPCMultistepScheduler.from_config(config, **FLOW),
}
TOLERANCES = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064)
SPEEDS = (2.0, 3.0, 4.0)


def draw(pipe: Any, seeds: Sequence[int], *, steps: int, cfg: float) -> np.ndarray:
    """Images `[seeds, height, width, 3]` in [0, 1], in one batch."""
    guided: dict[str, Any] = {"true_cfg_scale": cfg, "negative_prompt": [""] * len(seeds)} if cfg > 1 else {}
    return pipe(
        [sampling.prompt_of(seed) for seed in seeds],
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=steps,
        output_type="np",
        **sampling.SETTINGS,
        **guided,
    ).images


def evaluate(pipe: Any, config: CacheConfig, references: np.ndarray, seeds: Sequence[int], **options: Any) -> Point:
    """Mean speed, in steps over computed steps, and every image's PSNR."""
    afcache.compile_pipeline(pipe, config, compile=False)
    images = draw(pipe, seeds, **options)
    steps = [step for step in afcache.report(pipe).steps if step.branch == 0]
    afcache.restore_pipeline(pipe)
    computed = statistics.mean(sum(step.refreshed[index] for step in steps) for index in range(len(seeds)))
    quality = tuple(min(psnr(image, reference), 150.0) for image, reference in zip(images, references, strict=True))
    return Point(len(steps) / computed, quality)


def quality_at(curve: list[Point], speed: float) -> float | None:
    """Mean PSNR at a speed, linearly between tolerances; None beyond them."""
    speeds = [point.speed for point in sorted(curve)]
    means = [point.mean for point in sorted(curve)]
    return float(np.interp(speed, speeds, means)) if speeds[0] <= speed <= speeds[-1] else None


def rows_of(pipe: Any, name: str, seeds: Sequence[int], **options: Any) -> list[dict[str, Any]]:
    """With and without the correction, and what lies between."""
    references = draw(pipe, seeds, **options)
    curves: dict[bool, list[Point]] = {}
    for corrects in (False, True):
        configs = [dataclasses.replace(tuned(tolerance, target="noise"), correction=corrects) for tolerance in TOLERANCES]
        curves[corrects] = [evaluate(pipe, config, references, seeds, **options) for config in configs]
    rows = []
    for speed in SPEEDS:
        without, corrected = (quality_at(curves[corrects], speed) for corrects in (False, True))
        gained = corrected - without if without is not None and corrected is not None else None
        named = {"without (dB)": without, "with (dB)": corrected, "gained (dB)": gained}
        shown = {key: "-" if value is None else value for key, value in named.items()}
        rows.append({"scheduler": name, "true CFG": options["cfg"], "fewer steps computed": speed, **shown})
    return rows


def main() -> None:
    """Draw, and write bench/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--schedulers", nargs="+", choices=SCHEDULERS, default=list(SCHEDULERS))
    add("--seeds", type=int, default=64)
    add("--first-seed", type=int, default=15000)
    add("--steps", type=int, default=28)
    add("--cfg", type=float, nargs="+", default=[1.0, 2.0])
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    pipe: Any = sampling.load()
    config = pipe.scheduler.config
    rows = []
    for name in arguments.schedulers:
        pipe.scheduler = SCHEDULERS[name](config)
        for cfg in arguments.cfg:
            rows += rows_of(pipe, name, seeds, steps=arguments.steps, cfg=cfg)
            print(table(rows[-len(SPEEDS) :]), flush=True)
    notes = [
        f"mini-FLUX, {arguments.steps} steps, seeds {seeds.start} to {seeds.stop - 1}, float32. The presets' policy (noise) at "
        f"tolerances {', '.join(f'{tolerance:g}' for tolerance in TOLERANCES)}, with correction=False and as it is; mean PSNR "
        "in float64 against the uncached images of the same scheduler, linearly between tolerances. Images decide one by one.",
    ]
    print(write_result("compare_solvers", "Catching up, scheduler by scheduler", rows, notes=notes))


if __name__ == "__main__":
    main()
