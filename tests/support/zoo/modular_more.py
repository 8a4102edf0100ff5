"""More modular pipelines, tiny: FLUX.1, FLUX.1 Kontext, Stable Diffusion 3, Qwen-Image editing and Wan 2.2 VACE.

Qwen-Image's editing scales a picture to a million pixels: so a token of its autoencoder here is 128 pixels wide.
"""

from functools import partial
from typing import Any

import diffusers
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)

from tests.support.zoo import wan
from tests.support.zoo.kind import Kind
from tests.support.zoo.modular import as_given, assemble, take
from tests.support.zoo.modular_image import LEVELS, SIZE, SQUARE, TEXT, TOKENS, guider, make_qwen, masked
from tests.support.zoo.modular_video import modular
from tests.support.zoo.parts import build, embeddings, noise, picture
from tests.support.zoo.parts_video import clip
from tests.support.zoo.qwen_image import RememberingQwenImage


def make_flux(blocks: Any = diffusers.FluxAutoBlocks) -> Any:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "num_single_layers": 2}
    sizes |= {"in_channels": 16, "joint_attention_dim": TEXT, "pooled_projection_dim": 8, "axes_dims_rope": (4, 6, 6)}
    return assemble(
        blocks,
        transformer=build(FluxTransformer2DModel, gain=1.0, guidance_embeds=True, **sizes),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=build(AutoencoderKL, 1, latent_channels=4, shift_factor=0.1, **LEVELS),
    )


def make_sd3(scale: float | None = 7.0) -> Any:
    sizes: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "in_channels": 4,
        "sample_size": 16,
    }
    sizes |= {"joint_attention_dim": TEXT, "caption_projection_dim": 32, "pooled_projection_dim": 8, "pos_embed_max_size": 16}
    return assemble(
        diffusers.StableDiffusion3AutoBlocks,
        transformer=build(SD3Transformer2DModel, gain=0.9, out_channels=4, **sizes),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build(AutoencoderKL, 1, latent_channels=4, shift_factor=0.1, **LEVELS),
        guider=guider(scale),
    )


def make_edit(blocks: Any = diffusers.QwenImageEditAutoBlocks) -> Any:
    levels: dict[str, Any] = {"base_dim": 2, "z_dim": 4, "dim_mult": [1] * 7, "num_res_blocks": 0}
    levels |= {"temperal_downsample": [False] * 6, "latents_mean": [0.1] * 4, "latents_std": [1.5] * 4}
    plain = make_qwen()
    pipe = assemble(blocks, **take(plain, "transformer", "scheduler", "guider"), vae=build(RememberingQwenImage, 1, **levels))
    for name in ("image_processor", "image_resize_processor"):
        getattr(pipe, name).register_to_config(vae_scale_factor=128)
    return pipe


def make_vace() -> Any:
    experts = {"transformer": wan.make_control().transformer, "transformer_2": wan.make_control(5).transformer}
    return assemble(diffusers.Wan22VaceBlocks, **take(wan.make_control(), "vae", "scheduler"), **experts)


def _flux(pipe: Any, prompt: int) -> dict[str, Any]:
    return {"prompt_embeds": embeddings(prompt, TOKENS, TEXT), "pooled_prompt_embeds": noise(1, 8, seed=200 + prompt), **SQUARE}


def _flux_image(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**_flux(pipe, prompt), "image": picture(SIZE, SIZE), "strength": 0.7}


def _kontext(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**_flux(pipe, prompt), "image": picture(SIZE, SIZE), "max_area": SIZE**2, "_auto_resize": False}


def _sd3(pipe: Any, prompt: int) -> dict[str, Any]:
    negative = {"negative_prompt_embeds": embeddings(2, TOKENS, TEXT), "negative_pooled_prompt_embeds": noise(1, 8, seed=202)}
    return {**_flux(pipe, prompt), **negative}


def _edit(pipe: Any, prompt: int) -> dict[str, Any]:
    arguments = {**masked(pipe, prompt), "image": picture(SIZE, SIZE)}
    return {**arguments, "height": 512, "width": 512}


def _vace(pipe: Any, prompt: int) -> dict[str, Any]:
    masks = [picture(wan.WIDTH, wan.HEIGHT, 7, "L")] * wan.FRAMES
    return modular(wan.text(pipe, prompt), video=clip(wan.WIDTH, wan.HEIGHT, wan.FRAMES), mask=masks)


kontext = partial(make_flux, diffusers.FluxKontextAutoBlocks)
unguided = partial(make_sd3, None)
KINDS = [
    Kind("FluxModularPipeline", "FLUX.1", make_flux, _flux, latents=as_given),
    Kind("FluxModularPipeline [image]", "FLUX.1", make_flux, _flux_image, latents=as_given),
    Kind("FluxKontextModularPipeline", "FLUX.1", kontext, _kontext, latents=as_given),
    Kind("StableDiffusion3ModularPipeline", "Stable Diffusion 3", make_sd3, _sd3, {}, latents=as_given),
    Kind("StableDiffusion3ModularPipeline [unguided]", "Stable Diffusion 3", unguided, _sd3, None, {}, latents=as_given),
    Kind("QwenImageEditModularPipeline", "Qwen-Image", make_edit, _edit, {}, latents=as_given),
    Kind("Wan22VaceModularPipeline", "Wan 2.2", make_vace, _vace, {}, latents=as_given),
]
