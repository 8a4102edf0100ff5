"""How every benchmark samples mini-FLUX: one seed is one prompt, one noise, one image."""

from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline

import afcache
from afcache.assets import recommended_settings
from bench.mini_flux import data

_RECOMMENDED = recommended_settings(afcache.mini_flux_folder())
# Guidance is what the benchmarks vary.
SETTINGS = {name: _RECOMMENDED[name] for name in ("height", "width", "max_sequence_length")}


def load() -> FluxPipeline:
    """mini-FLUX without progress bars."""
    pipe = afcache.load_mini_flux()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt_of(seed: int) -> str:
    """Digits and places in turn, so that any 20 consecutive seeds show all of them."""
    return data.prompt(seed % 10, (seed // 10) % 2)


def draw(pipe: Any, seed: int, *, steps: int = 28, cfg: float = 1.0, output_type: str = "np") -> np.ndarray:
    """One image `[height, width, 3]` in [0, 1], or its latents."""
    options: dict[str, Any] = {"true_cfg_scale": cfg, "negative_prompt": ""} if cfg > 1 else {}
    generator = torch.Generator().manual_seed(seed)
    options.update(SETTINGS, num_inference_steps=steps, generator=generator, output_type=output_type)
    image = pipe(prompt_of(seed), **options).images[0]
    return image.numpy() if isinstance(image, torch.Tensor) else image
