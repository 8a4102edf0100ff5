"""How every benchmark samples a small model: one seed is one prompt, one noise, one image.

Generators stay on the CPU, so that a seed is the same noise wherever the pipeline is.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import FluxPipeline

import afcache
from afcache._typing import Latents, Sigmas
from bench.mini_flux.recipe import MINI_FLUX, Recipe


def settings_of(recipe: Recipe) -> dict[str, int]:
    """Height and width (pixels) and text tokens; guidance is what the benchmarks vary."""
    return {"height": recipe.image_size, "width": recipe.image_size, "max_sequence_length": recipe.text_length}


SETTINGS = settings_of(MINI_FLUX)


def load(recipe: Recipe = MINI_FLUX) -> FluxPipeline:
    """The trained model without progress bars, on the CPU."""
    pipe = FluxPipeline.from_pretrained(recipe.folder, dtype=torch.float32)
    pipe.default_sample_size = recipe.image_size // pipe.vae_scale_factor
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt_of(seed: int) -> str:
    """mini-FLUX's: digits and places in turn, so that any 20 consecutive seeds show all of them."""
    return MINI_FLUX.prompt_of(seed)


def draw(
    pipe: Any,
    seed: int,
    *,
    steps: int = 28,
    cfg: float = 1.0,
    output_type: str = "np",
    recipe: Recipe = MINI_FLUX,
    callback: Callable[..., dict[str, Any]] | None = None,
) -> np.ndarray:
    """One image `[height, width, 3]` in [0, 1], or its latents; `callback` may change them after a step."""
    options: dict[str, Any] = {"true_cfg_scale": cfg, "negative_prompt": ""} if cfg > 1 else {}
    generator = torch.Generator().manual_seed(seed)
    options.update(settings_of(recipe), num_inference_steps=steps, generator=generator, output_type=output_type)
    options["callback_on_step_end"] = callback
    image = pipe(recipe.prompt_of(seed), **options).images[0]
    return image.cpu().numpy() if isinstance(image, torch.Tensor) else image


class Prepared(NamedTuple):
    """A batch of seeds before its first step, and where the uncached pipeline takes it.

    Attributes:
        branches: inputs of each guidance branch, the prompt's first; batch axis: seeds.
        sigmas: noise levels, one more than steps.
        cfg: true CFG scale.
        latents: the uncached pipeline's result.

    """

    branches: tuple[afcache.FluxInputs, ...]
    sigmas: Sigmas
    cfg: float
    latents: Latents


def prepare(pipe: Any, seeds: Sequence[int], *, steps: int = 28, cfg: float = 1.0, recipe: Recipe = MINI_FLUX) -> Prepared:
    """Sample without a cache, and keep what the transformer was first called with; all on the pipeline's device."""
    calls: list[dict[str, Any]] = []

    def remember(module: torch.nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        del module, args
        if len(calls) < (2 if cfg > 1 else 1):
            calls.append(inputs)

    options: dict[str, Any] = {"true_cfg_scale": cfg, "negative_prompt": [""] * len(seeds)} if cfg > 1 else {}
    hook = pipe.transformer.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        latents = pipe(
            [recipe.prompt_of(seed) for seed in seeds],
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
            **settings_of(recipe),
            **options,
        ).images
    finally:
        hook.remove()
    branches = tuple(
        afcache.FluxInputs(**{name: call[name] for name in afcache.FluxInputs._fields if name in call}) for call in calls
    )
    return Prepared(branches, pipe.scheduler.sigmas.to(latents.device, copy=True), cfg, latents)


def conditions_of(branch: afcache.FluxInputs) -> dict[str, torch.Tensor]:
    """What a guidance branch's calls of the transformer have in common, by the names of its arguments."""
    names = ("encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids")
    return {name: getattr(branch, name) for name in names}


def decode(pipe: Any, latents: torch.Tensor, recipe: Recipe = MINI_FLUX) -> np.ndarray:
    """Latents to images `[batch, height, width, 3]` in [0, 1], as the pipeline does it."""
    latents = pipe._unpack_latents(latents, recipe.image_size, recipe.image_size, pipe.vae_scale_factor)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    with torch.no_grad():
        image = pipe.vae.decode(latents, return_dict=False)[0]
    return pipe.image_processor.postprocess(image, output_type="np")
