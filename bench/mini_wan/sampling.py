"""How every benchmark samples mini-Wan: one seed is one prompt, one noise, one clip."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import afcache
from bench.mini_wan import data

# Made of mini-Wan's own scheduler's settings, which is the first.
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "UniPC": UniPCMultistepScheduler.from_config,
    "FlowMatchEuler": lambda config: FlowMatchEulerDiscreteScheduler(shift=config.flow_shift),
}


def settings() -> dict[str, Any]:
    """Size, frames, text tokens, guidance and steps, as recommended."""
    return afcache.recommended_settings(afcache.mini_wan_folder())


def load(scheduler: str = "UniPC") -> Any:
    """The trained model without progress bars, on the CPU, in float32, under one of `SCHEDULERS`."""
    pipe = afcache.load_mini_wan()
    pipe.scheduler = SCHEDULERS[scheduler](pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, seed: int, *, steps: int = 28, **options: Any) -> np.ndarray:
    """One clip `[frames, height, width, 3]` in [0, 1].

    Args:
        pipe: mini-Wan, of one expert or of two.
        seed: of prompt and noise.
        steps: of the schedule.
        options: in place of what is recommended.

    """
    generator = torch.Generator().manual_seed(seed)
    arguments = {**settings(), **options, "num_inference_steps": steps, "generator": generator}
    return pipe(data.prompt_of(seed), output_type="np", **arguments).frames[0]
