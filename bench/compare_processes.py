"""What the cache is worth where a model is no flow: mini-FLUX, told to predict noise, or its difference to a clean image.

    python -m bench.compare_processes

A flow's path is that of any other process in other coordinates: x / (alpha + s) at noise level s / (alpha + s). So the trained
flow answers for a model of DiT's, PixArt's or CogVideoX's kind exactly, with their schedules and schedulers, by their output.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

import afcache
from afcache import CacheConfig
from afcache.calibration.metrics import psnr
from afcache.settings.config import Target
from afcache.settings.presets import tuned
from bench.mini_flux import sampling
from bench.record.recording import write_result
from bench.record.render import table
from bench.search.curves import Point, speed_at

SCHEDULERS: dict[str, Callable[[], Any]] = {
    "DiT's: noise, DDIM": lambda: DDIMScheduler(clip_sample=False),
    "PixArt's: noise, DPM++ 2M": lambda: DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    "CogVideoX's: v, DDIM": lambda: CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=3.0
    ),
}
TOLERANCES = (0.002, 0.004, 0.008, 0.012, 0.016, 0.024, 0.032)
QUALITIES = (45, 40, 35)
GUIDANCE = 2.0
# What is forecast, and whether it is caught up with.
WAYS: tuple[tuple[Target, bool], ...] = (("noise", True), ("noise", False), ("velocity", True))


class Diffusion(torch.nn.Module):
    """A flow as a model of another process.

    Args:
        flow: FLUX.
        scheduler: whose betas and prediction the model has.
        inputs: of the flow's forward but for latents and timestep, for each guidance branch.

    """

    def __init__(self, flow: Any, scheduler: Any, inputs: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        self.flow, self.inputs = flow, inputs
        self.products, self.predicts = scheduler.alphas_cumprod.double(), scheduler.config.prediction_type

    def forward(self, hidden_states: Tensor, timestep: Tensor, branch: int = 0, return_dict: bool = True) -> Any:
        """Its output at one of the scheduler's timesteps, for a branch."""
        product = self.products[timestep[0]]
        alpha, s = float(product.sqrt()), float((1 - product).clamp(min=0).sqrt())
        x, sigma = hidden_states / (alpha + s), s / (alpha + s)
        level = torch.full((len(x),), sigma, dtype=x.dtype)
        velocity = self.flow(hidden_states=x, timestep=level, **self.inputs[branch], return_dict=False)[0]
        noise, clean = x + (1 - sigma) * velocity, x - sigma * velocity
        output = noise if self.predicts == "epsilon" else alpha * noise - s * clean
        return {"sample": output} if return_dict else (output,)


class Plain:
    """The shortest pipeline around it.

    Args:
        pipe: of the flow.
        scheduler: of the process.
        seeds: drawn together.
        cfg: true CFG scale; 1 for none.

    """

    def __init__(self, pipe: Any, scheduler: Any, seeds: Sequence[int], cfg: float) -> None:
        self._pipe, self._cfg, self.scheduler = pipe, cfg, scheduler
        first = sampling.prepare(pipe, seeds, steps=1, cfg=cfg)
        self._noise = first.branches[0].hidden_states
        self.transformer = Diffusion(pipe.transformer, scheduler, list(map(sampling.conditions_of, first.branches)))

    @torch.no_grad()
    def __call__(self, steps: int) -> np.ndarray:
        """Images `[seeds, height, width, 3]` in [0, 1]."""
        self.scheduler.set_timesteps(steps)
        latents = self._noise
        for timestep in self.scheduler.timesteps:
            times = timestep.expand(len(latents))
            output = self.transformer(latents, times, branch=0, return_dict=False)[0]
            if self._cfg > 1:
                without = self.transformer(latents, times, branch=1, return_dict=False)[0]
                output = without + self._cfg * (output - without)
            latents = self.scheduler.step(output, timestep, latents, return_dict=False)[0]
        return sampling.decode(self._pipe, latents)


def evaluate(pipe: Plain, config: CacheConfig, references: np.ndarray, steps: int) -> Point:
    """Mean speed, in steps over computed steps, and every image's PSNR."""
    afcache.compile_pipeline(pipe, config, compile=False)
    images = pipe(steps)
    records = [step for step in afcache.report(pipe).steps if step.branch == 0]
    afcache.restore_pipeline(pipe)
    computed = sum(sum(step.refreshed) for step in records) / len(images)
    quality = tuple(min(psnr(image, reference), 150.0) for image, reference in zip(images, references, strict=True))
    return Point(len(records) / computed, quality)


def main() -> None:
    """Draw, and write bench/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=int, default=32)
    add("--first-seed", type=int, default=16000)
    add("--steps", type=int, default=28)
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    flow = sampling.load()
    rows, equal = [], []
    for name, make in SCHEDULERS.items():
        for cfg in (1.0, GUIDANCE):
            pipe = Plain(flow, make(), seeds, cfg)
            references = pipe(arguments.steps)
            # Of a model that predicts noise, both targets keep the same.
            is_noise = pipe.transformer.predicts == "epsilon"
            for target, corrects in WAYS[:2] if is_noise else WAYS:
                way, curve = target if corrects else f"{target}, not corrected", []
                for tolerance in TOLERANCES:
                    config = dataclasses.replace(tuned(tolerance, target=target), correction=corrects)
                    curve.append(evaluate(pipe, config, references, arguments.steps))
                    point = {"fewer steps computed": curve[-1].speed, "PSNR (dB)": curve[-1].mean, "worst": curve[-1].worst}
                    rows.append({"process": name, "true CFG": cfg, "way": way, "tolerance": tolerance, **point})
                at = {f"at {quality} dB": speed_at(curve, quality) for quality in QUALITIES}
                equal.append({"process": name, "true CFG": cfg, "way": way, **at})
                print(table(equal[-1:]), flush=True)
    notes = [
        f"mini-FLUX as a model of each process, {arguments.steps} steps, seeds {seeds.start} to {seeds.stop - 1}, float32, "
        "nothing compiled; the presets' policy. PSNR in float64 against the uncached images of the same process and scheduler; "
        "images decide one by one. Where the model predicts noise, that is what both targets keep, and they are one way.",
    ]
    print(write_result("compare_processes", "Models that are no flow's", [*equal, *rows], notes=notes, shown=equal))


if __name__ == "__main__":
    main()
