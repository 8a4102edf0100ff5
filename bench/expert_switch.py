"""May the second expert of Wan 2.2 go on with the first one's history? Measured on mini-Wan of two experts.

    python -m bench.expert_switch

Where one model hands over to another within an image, AFCache begins the second with no history, as every image begins. The
other ways are tried here with both experts behind one forward, which the cache takes for one model: it forecasts across the
switch as if there were none, or with the step of the switch computed.
"""

import argparse
import copy
import dataclasses
import json
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor

import afcache
from afcache import CacheConfig
from afcache.calibration.metrics import psnr
from afcache.settings.presets import tuned
from bench.mini_wan import sampling
from bench.mini_wan.parts import EXPERTS
from bench.record.recording import write_result
from bench.record.render import table
from bench.search.curves import Point, speed_at

TOLERANCES = (0.002, 0.004, 0.008, 0.012, 0.016, 0.024)
QUALITIES = (40, 35, 30)
EACH, ONE, COMPUTED = "a history each", "one history", "one history, the switch computed"


class Experts(WanTransformer3DModel):
    """Both experts behind one forward, which asks for the noise level."""

    low: Any
    boundary: float

    def forward(self, hidden_states: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Of the expert for this noise level."""
        if float(timestep.max()) < self.boundary:
            return self.low(hidden_states, timestep, *args, **kwargs)
        return super().forward(hidden_states, timestep, *args, **kwargs)  # pyright: ignore[reportArgumentType]


def load() -> Any:
    """mini-Wan of two experts."""
    pipe = WanPipeline.from_pretrained(EXPERTS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def join(pipe: Any) -> Any:
    """The same pipeline with one transformer, which is both experts."""
    joined = copy.deepcopy(pipe.transformer)
    joined.__class__ = Experts
    joined.low, joined.boundary = pipe.transformer_2, pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
    parts = {name: part for name, part in pipe.components.items() if "transformer" not in name}
    one = WanPipeline(**parts | {"scheduler": copy.deepcopy(pipe.scheduler)}, transformer=joined)  # pyright: ignore[reportArgumentType]
    one.set_progress_bar_config(disable=True)
    return one


def draw(pipe: Any, seed: int, settings: dict[str, Any]) -> np.ndarray:
    """A clip `[frames, height, width, 3]` in [0, 1]."""
    options = dict(settings)
    return sampling.draw(pipe, seed, steps=options.pop("num_inference_steps"), **options)


def switch_of(pipe: Any, settings: dict[str, Any]) -> int:
    """The first step of the second expert."""
    pipe.scheduler.set_timesteps(settings["num_inference_steps"])
    boundary = pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
    return int((pipe.scheduler.timesteps >= boundary).sum())


def evaluate(pipe: Any, config: Callable[[int], CacheConfig], references: dict[int, np.ndarray], **settings: Any) -> Point:
    """Speed and PSNR of every clip.

    Args:
        pipe: either of the two.
        config: settings of a seed.
        references: uncached clips by seed.
        settings: of the pipeline's call.

    """
    quality, computed, steps = [], 0, 0
    for seed, reference in references.items():
        afcache.compile_pipeline(pipe, config(seed), compile=False)
        quality.append(min(psnr(draw(pipe, seed, settings), reference), 150.0))
        pattern = afcache.report(pipe).pattern()
        computed, steps = computed + pattern.count("F"), steps + len(pattern)
        afcache.restore_pipeline(pipe)
    return Point(steps / computed, tuple(quality))


def planned(pattern: str, switch: int) -> CacheConfig:
    """What a run has computed, and the step of the switch."""
    steps = {index for index, kind in enumerate(pattern) if kind == "F"} | {switch}
    warmup = next(index for index in range(len(pattern)) if index not in steps)
    later = tuple(sorted(index for index in steps if index >= warmup))
    return dataclasses.replace(tuned(0.016, target="noise"), policy="planned", warmup_steps=warmup, refresh_steps=later)


def main() -> None:
    """Draw, and write bench/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--first-seed", type=int, default=14000)
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.clips)
    pipe = load()
    one = join(pipe)
    settings = json.loads((EXPERTS / "recommended.json").read_text())
    switch = switch_of(pipe, settings)
    references = {seed: draw(pipe, seed, settings) for seed in seeds}
    curves: dict[str, list[Point]] = {EACH: [], ONE: [], COMPUTED: []}
    for tolerance in TOLERANCES:
        config = tuned(tolerance, target="noise")
        patterns = {}
        for seed in seeds:
            afcache.compile_pipeline(one, config, compile=False)
            draw(one, seed, settings)
            patterns[seed] = afcache.report(one).pattern()
            afcache.restore_pipeline(one)
        ways: dict[str, tuple[Any, Callable[[int], CacheConfig]]] = {
            EACH: (pipe, lambda _, config=config: config),
            ONE: (one, lambda _, config=config: config),
            COMPUTED: (one, lambda seed, patterns=patterns: planned(patterns[seed], switch)),
        }
        for name, (which, of_seed) in ways.items():
            curves[name].append(evaluate(which, of_seed, references, **settings))
    rows = [
        {
            "way": name,
            "tolerance": tolerance,
            "fewer model calls": point.speed,
            "PSNR (dB)": point.mean,
            "median": statistics.median(point.psnr),
            "worst": point.worst,
        }
        for name, curve in curves.items()
        for tolerance, point in zip(TOLERANCES, curve, strict=True)
    ]
    equal = [{"way": name, **{f"at {q} dB": speed_at(curve, q) for q in QUALITIES}} for name, curve in curves.items()]
    notes = [
        f"mini-Wan of two experts, {settings['num_inference_steps']} steps, UniPC, guidance {settings['guidance_scale']:g}; "
        f"the second expert takes over at step {switch}. Seeds {seeds.start} to {seeds.stop - 1}, float32, nothing compiled; "
        "PSNR of a whole clip's frames in float64 against the uncached clip.",
        f"{COMPUTED}: the refreshes that {ONE!r} chose for the clip, and that of the switch.",
        "Fewer model calls at equal mean PSNR, linearly between tolerances:",
        "",
        table(equal),
    ]
    print(table(rows), *notes, sep="\n")
    print(write_result("expert_switch", "At a switch of experts", [*rows, *equal], notes=notes, shown=rows))


if __name__ == "__main__":
    main()
