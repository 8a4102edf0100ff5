"""What the comparison samples: mini-FLUX, mini-Wan, somebody's FLUX, or random weights of a given size."""

from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import FluxPipeline

from bench.mini_flux import sampling
from bench.mini_wan import sampling as sampling_of_videos
from bench.models.random_flux import default_dtype
from bench.models.random_model import RANDOM, RandomModel

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = tuple(_DTYPES)
_TRAINED: dict[str, Any] = {"mini": sampling, "mini-wan": sampling_of_videos}
PROMPTS = (
    "A lighthouse on a cliff at dusk, long exposure",
    "A red fox asleep in fresh snow, close-up",
    "A street market in the rain, neon signs reflected in puddles",
    "A bowl of ramen on a wooden table, seen from above",
    "An astronaut planting a sunflower on the moon",
    "A handwritten letter, a fountain pen and a cup of coffee",
    "A glass greenhouse full of ferns, morning light",
    "A steam locomotive crossing a stone bridge in autumn",
)


class Task(NamedTuple):
    """What every contender does.

    Attributes:
        model: "mini", "mini-wan", "random:NAME", or a folder or hub id.
        steps: denoising steps.
        resolution: pixels of a side; None: what the model is made for.
        dtype: of the weights.
        device: "cpu" or "cuda".
        patterns: for random weights, "F" and "." for each step: by contender, or under "" for all of them.
        mag_ratios: MagCache's calibration, of its own mode.
        backend: of torch.compile.
        scheduler: of mini-Wan, in place of its own.

    """

    model: str
    steps: int
    resolution: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    patterns: dict[str, str] | None = None
    mag_ratios: tuple[float, ...] = ()
    backend: str = "inductor"
    scheduler: str | None = None

    @property
    def is_random(self) -> bool:
        """Whether the weights are random, so that only costs can be compared."""
        return self.model.startswith("random:")

    @property
    def random(self) -> RandomModel:
        """What its random weights are of."""
        return RANDOM[self.model.removeprefix("random:")]

    @property
    def calls(self) -> int:
        """Of the transformer at each step."""
        return self.random.calls if self.is_random else 2 if self.model == "mini-wan" else 1


def load(task: Task) -> Any:
    """A fresh pipeline on the task's device."""
    if task.model in _TRAINED:
        pipe = _TRAINED[task.model].load(*([task.scheduler] if task.scheduler else []))
        return pipe if (task.device, task.dtype) == ("cpu", "float32") else pipe.to(task.device, _DTYPES[task.dtype])
    if task.is_random:
        # Made in their own precision: in float32 the largest would need twice its memory for a moment.
        with torch.device(task.device), default_dtype(_DTYPES[task.dtype]):
            transformer = task.random.make_transformer()
        return task.random.make_pipeline(transformer).to(task.device)
    pipe = FluxPipeline.from_pretrained(task.model, dtype=_DTYPES[task.dtype]).to(task.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, task: Task, seed: int, *, steps: int | None = None) -> np.ndarray:
    """One image `[height, width, 3]`, or clip `[frames, height, width, 3]`, in [0, 1]; of random weights its latents."""
    steps = steps or task.steps
    generator = torch.Generator(task.device).manual_seed(seed)
    if task.model in _TRAINED:
        return _TRAINED[task.model].draw(pipe, seed, steps=steps)
    if task.is_random:
        return task.random.draw(pipe, image_tokens(task), seed=seed, steps=steps)
    size = {} if task.resolution is None else {"height": task.resolution, "width": task.resolution}
    prompt = PROMPTS[seed % len(PROMPTS)]
    return pipe(prompt, num_inference_steps=steps, generator=generator, output_type="np", **size).images[0]


def image_tokens(task: Task) -> int:
    """How many image tokens random weights see."""
    return task.random.tokens(task.resolution or task.random.side)
