"""Can steps be forecast where each draws new noise? Measured on mini-FLUX, the same noise at the same steps.

    python -m bench.stochastic_steps

What is kept of a refresh and forecast later is the velocity, the noise beyond it, or the clean image x - sigma v: of these the
last is told what was injected since, because the velocity that it means, (x - image) / sigma, is made with the present latents.
Beside them, as many steps as would have been computed.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from afcache.calibration.metrics import psnr
from afcache.functional.target import NOISE_LEVEL
from bench.mini_flux import sampling
from bench.record.recording import write_result
from bench.record.render import table

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "stochastic Euler": lambda config: FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=True),
    "SDE-DPM++ 2M": lambda config: DPMSolverMultistepScheduler.from_config(
        config,
        algorithm_type="sde-dpmsolver++",
        use_flow_sigmas=True,
        use_dynamic_shifting=True,
        prediction_type="flow_prediction",
    ),
}
WARMUP = 2
# The noise level at which the line through x and v is kept: x + (level - sigma) v; None keeps v itself.
TARGETS: dict[str, float | None] = {"velocity": None, "noise": NOISE_LEVEL, "clean image": 0.0}


class Way(NamedTuple):
    """How steps are left out.

    Attributes:
        target: what is forecast; None: fewer steps.
        order: 0 reuses, 1 extrapolates in sigma.
        interval: every how many steps one is computed, after the warmup.

    """

    target: str | None
    order: int
    interval: int

    def computes(self, step: int) -> bool:
        """Whether a step is computed."""
        return step < WARMUP or (step - WARMUP + 1) % self.interval == 0

    def computed(self, steps: int) -> int:
        """How many steps are."""
        return sum(map(self.computes, range(steps)))


class Flow(NamedTuple):
    """The trained model with a batch's inputs.

    Attributes:
        pipe: mini-FLUX.
        inputs: of its transformer, but for latents and timestep.
        noise: that the images begin with.

    """

    pipe: Any
    inputs: dict[str, Tensor]
    noise: Tensor

    def velocity(self, x: Tensor, timestep: Tensor) -> Tensor:
        """V at the scheduler's timestep."""
        times = (timestep / 1000).expand(len(x)).to(x.dtype)
        return self.pipe.transformer(hidden_states=x, timestep=times, **self.inputs, return_dict=False)[0]


@torch.no_grad()
def sample(flow: Flow, scheduler: Any, seeds: Sequence[int], steps: int, way: Way | None = None) -> Tensor:
    """Latents at the end; every seed's generator draws the noise of its steps."""
    walked = steps if way is None or way.target is not None else way.computed(steps)
    scheduler.set_timesteps(walked, mu=0.5)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x, kept = flow.noise, []
    for index, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[index]
        level = None if way is None or way.target is None else TARGETS[way.target]
        if way is None or way.target is None or way.computes(index):
            velocity = flow.velocity(x, timestep)
            kept = [(sigma, velocity if level is None else x + (level - sigma) * velocity), *kept[:1]]
        else:
            forecast = kept[0][1]
            if way.order and len(kept) == 2:
                (newer, first), (older, second) = kept
                forecast = first + (sigma - newer) / (newer - older) * (first - second)
            velocity = forecast if level is None else (forecast - x) / (level - sigma)
        x = scheduler.step(velocity, timestep, x, generator=generators, return_dict=False)[0]
    return x


def main() -> None:
    """Draw, and write bench/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--first-seed", type=int, default=17000)
    parser.add_argument("--steps", type=int, default=28)
    arguments = parser.parse_args()
    seeds, steps = range(arguments.first_seed, arguments.first_seed + arguments.seeds), arguments.steps
    pipe: Any = sampling.load()
    first = sampling.prepare(pipe, seeds, steps=1).branches[0]
    flow = Flow(pipe, sampling.conditions_of(first), first.hidden_states)
    ways = [Way(target, order, interval) for target in TARGETS for order in (0, 1) for interval in (2, 3, 4)]
    ways += [Way(None, 0, interval) for interval in (2, 3, 4)]
    rows = []
    for name, make in SCHEDULERS.items():
        reference = sampling.decode(pipe, sample(flow, make(pipe.scheduler.config), seeds, steps))
        for way in ways:
            images = sampling.decode(pipe, sample(flow, make(pipe.scheduler.config), seeds, steps, way))
            quality = [psnr(*pair) for pair in zip(images, reference, strict=True)]
            label = "fewer steps" if way.target is None else f"{way.target}, {('reused', 'extrapolated')[way.order]}"
            speed = steps / way.computed(steps)
            shown = {"PSNR (dB)": statistics.mean(quality), "worst": min(quality), "best": max(quality)}
            rows.append({"scheduler": name, "way": label, "fewer steps computed": speed, **shown})
        print(table(rows[-len(ways) :]), flush=True)
    notes = [
        f"mini-FLUX, {steps} steps, no guidance, seeds {seeds.start} to {seeds.stop - 1}, float32; two steps of warmup, then "
        "every second, third or fourth is computed. Every image has a generator of its own, so that its steps draw the same "
        "noise whatever is forecast; fewer steps draw fewer times. PSNR in float64 against all steps computed.",
    ]
    print(write_result("stochastic_steps", "Steps that draw new noise", rows, notes=notes))


if __name__ == "__main__":
    main()
