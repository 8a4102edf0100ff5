"""What the comparison samples: mini-FLUX, somebody's FLUX, or random weights of a given size."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from bench import mini_sampling

TEXT_TOKENS = 64
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = tuple(_DTYPES)
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


class Size(NamedTuple):
    """A FLUX of random weights: width, blocks of both kinds, image tokens."""

    dim: int
    double: int
    single: int
    tokens: int


SIZES = {
    "tiny": Size(64, 1, 2, 16),
    "small": Size(512, 4, 8, 256),
    "medium": Size(768, 6, 12, 576),
    "flux1": Size(3072, 19, 38, 4096),
}


class Task(NamedTuple):
    """What every contender does.

    Attributes:
        model: "mini", "random:SIZE", or a folder or hub id.
        steps: denoising steps.
        resolution: pixels of a side; None: what the model is made for.
        dtype: of the weights.
        device: "cpu" or "cuda".
        patterns: for random weights, "F" and "." for each step: by contender, or under "" for all of them.
        mag_ratios: MagCache's calibration, of its own mode.
        backend: of torch.compile.

    """

    model: str
    steps: int
    resolution: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    patterns: dict[str, str] | None = None
    mag_ratios: tuple[float, ...] = ()
    backend: str = "inductor"

    @property
    def is_random(self) -> bool:
        """Whether the weights are random, so that only costs can be compared."""
        return self.model.startswith("random:")


def make_transformer(*, dim: int, double: int, single: int) -> Any:
    """FLUX with random weights."""
    torch.manual_seed(0)
    head_dim = 128 if dim >= 3072 else 64 if dim >= 512 else 32
    rotary = {128: (16, 56, 56), 64: (8, 28, 28), 32: (4, 14, 14)}[head_dim]
    return FluxTransformer2DModel(
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=head_dim,
        num_attention_heads=dim // head_dim,
        axes_dims_rope=rotary,
        in_channels=64,
        joint_attention_dim=dim,
        pooled_projection_dim=dim,
        guidance_embeds=True,
    ).eval()


def make_pipeline(transformer: Any) -> Any:
    """A real FluxPipeline around it, without text encoders and decoder: the loop users run."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(scheduler=scheduler, transformer=transformer, **parts)  # pyright: ignore[reportArgumentType]
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def load(task: Task) -> Any:
    """A fresh pipeline on the task's device."""
    if task.model == "mini":
        pipe = mini_sampling.load()
        return pipe if (task.device, task.dtype) == ("cpu", "float32") else pipe.to(task.device, _DTYPES[task.dtype])
    if task.is_random:
        size = SIZES[task.model.removeprefix("random:")]
        # Made in their own precision: in float32 the largest would need twice its memory for a moment.
        with torch.device(task.device), _default_dtype(_DTYPES[task.dtype]):
            transformer = make_transformer(dim=size.dim, double=size.double, single=size.single)
        return make_pipeline(transformer).to(task.device)
    pipe = FluxPipeline.from_pretrained(task.model, dtype=_DTYPES[task.dtype]).to(task.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, task: Task, seed: int, *, steps: int | None = None) -> np.ndarray:
    """One image `[height, width, 3]` in [0, 1]; of random weights its latents."""
    steps = steps or task.steps
    generator = torch.Generator(task.device).manual_seed(seed)
    if task.model == "mini":
        return mini_sampling.draw(pipe, seed, steps=steps)
    if task.is_random:
        return draw_random(pipe, image_tokens(task), seed=seed, steps=steps)
    size = {} if task.resolution is None else {"height": task.resolution, "width": task.resolution}
    prompt = PROMPTS[seed % len(PROMPTS)]
    return pipe(prompt, num_inference_steps=steps, generator=generator, output_type="np", **size).images[0]


def image_tokens(task: Task) -> int:
    """How many image tokens random weights see."""
    if task.resolution is not None:
        return (task.resolution // 16) ** 2
    return SIZES[task.model.removeprefix("random:")].tokens


def draw_random(pipe: Any, tokens: int, *, seed: int = 0, steps: int = 28, true_cfg_scale: float = 1.0) -> np.ndarray:
    """Latents of random weights; a guidance scale above 1 adds a negative prompt."""
    dim = pipe.transformer.config.joint_attention_dim
    side = int(tokens**0.5) * 16
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randn(1, TEXT_TOKENS, dim, generator=generator).to(pipe.device, pipe.dtype)
    pooled = torch.randn(1, dim, generator=generator).to(pipe.device, pipe.dtype)
    guided: dict[str, Any] = {}
    if true_cfg_scale > 1:
        guided = {"negative_prompt_embeds": -prompt, "negative_pooled_prompt_embeds": -pooled, "true_cfg_scale": true_cfg_scale}
    latents = pipe(
        prompt_embeds=prompt,
        pooled_prompt_embeds=pooled,
        height=side,
        width=side,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
        **guided,
    ).images
    return latents[0].float().cpu().numpy()
