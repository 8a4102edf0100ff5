"""mini-FLUX and mini-Wan, loaded."""

from typing import Any

import torch
from diffusers import FluxPipeline, WanPipeline

from afcache.assets import mini_flux_folder, mini_wan_folder, recommended_settings


def load_mini_flux(*, dtype: torch.dtype = torch.float32, **options: Any) -> FluxPipeline:
    """Load mini-FLUX: handwritten digits over two photographs, 32 x 32 pixels, 2.5 million parameters.

    A plain `pipe(prompt, max_sequence_length=16)` draws the trained size. FLUX does not mask text padding, so the text
    length should be the trained one.

    Args:
        dtype: of all components.
        options: passed to `FluxPipeline.from_pretrained`.

    """
    pipe = FluxPipeline.from_pretrained(mini_flux_folder(), dtype=dtype, **options)
    pipe.default_sample_size = recommended_settings(mini_flux_folder())["height"] // pipe.vae_scale_factor
    return pipe


def load_mini_wan(*, dtype: torch.dtype = torch.float32, **options: Any) -> WanPipeline:
    """Load mini-Wan: a handwritten digit that moves over a photograph, 17 frames of 32 x 32 pixels, 3.1 million parameters.

    Wan's defaults are those of a large model, so say what it was trained for:

        pipe("a handwritten seven moves left over a flower", **afcache.recommended_settings(afcache.mini_wan_folder()))

    Args:
        dtype: of all components.
        options: passed to `WanPipeline.from_pretrained`.

    """
    return WanPipeline.from_pretrained(mini_wan_folder(), dtype=dtype, **options)
