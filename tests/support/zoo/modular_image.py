"""Modular pipelines of images, tiny: Qwen-Image, Z-Image, FLUX.2 and FLUX.3."""

from typing import Any

import diffusers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.guiders import ClassifierFreeGuidance

from tests.support.zoo.kind import Kind
from tests.support.zoo.modular import as_given, assemble
from tests.support.zoo.parts import build, embeddings, ones, picture

TEXT, TOKENS, SIZE = 16, 6, 64
SQUARE = {"height": SIZE, "width": SIZE, "output": "latents"}
LEVELS: dict[str, Any] = {"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2}
LEVELS |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
LEVELS |= {"mid_block_add_attention": False}


def guider(scale: float | None) -> Any:
    return ClassifierFreeGuidance(guidance_scale=scale or 1.0, enabled=scale is not None)


def make_qwen(chosen: Any = None) -> Any:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "in_channels": 16}
    sizes |= {"out_channels": 4, "joint_attention_dim": TEXT, "axes_dims_rope": (4, 4, 4)}
    shifts = {"base_image_seq_len": 256, "max_image_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02}
    levels: dict[str, Any] = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    levels |= {"latents_mean": [0.1] * 4, "latents_std": [1.5] * 4}
    return assemble(
        diffusers.QwenImageAutoBlocks,
        transformer=build(QwenImageTransformer2DModel, gain=1.0, **sizes),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **shifts),
        vae=build(AutoencoderKLQwenImage, 1, **levels),
        guider=chosen or guider(4.0),
    )


def make_qwen_unguided() -> Any:
    return make_qwen(guider(None))


def make_z_image(scale: float | None = None) -> Any:
    sizes: dict[str, Any] = {"in_channels": 4, "dim": 24, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    sizes |= {"cap_feat_dim": TEXT, "axes_dims": [4, 4, 4], "axes_lens": [64, 16, 16]}
    return assemble(
        diffusers.ZImageAutoBlocks,
        transformer=build(ZImageTransformer2DModel, **sizes),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build(AutoencoderKL, 1, latent_channels=4, shift_factor=0.1, **LEVELS),
        guider=guider(scale),
    )


def make_flux2(blocks: Any = diffusers.Flux2AutoBlocks, guidance_embeds: bool = True, **guiders: Any) -> Any:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "num_single_layers": 2}
    sizes |= {"in_channels": 16, "joint_attention_dim": TEXT, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16}
    return assemble(
        blocks,
        transformer=build(Flux2Transformer2DModel, gain=1.1, guidance_embeds=guidance_embeds, **sizes),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=build(AutoencoderKLFlux2, 1, latent_channels=4, **LEVELS),
        **guiders,
    )


def make_flux2_klein() -> Any:
    return make_flux2(diffusers.Flux2KleinAutoBlocks, False)


def make_flux2_klein_base() -> Any:
    return make_flux2(diffusers.Flux2KleinBaseAutoBlocks, False, guider=guider(4.0))


def make_flux3(blocks: Any = diffusers.Flux3AutoBlocks, flow_map: bool = False, **guiders: Any) -> Any:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "num_single_layers": 2}
    sizes |= {"in_channels": 16, "cond_in_channels": 16, "joint_attention_dim": TEXT, "axes_dims_rope": (4, 4, 4, 4)}
    return assemble(
        blocks,
        transformer=build(Flux3Transformer2DModel, gain=1.1, flow_map=flow_map, timestep_channels=16, **sizes),
        vae=build(AutoencoderKLFlux2, 1, latent_channels=4, **LEVELS),
        **guiders,
    )


def make_flux3_unguided() -> Any:
    return make_flux3(guider=guider(None))


def make_flux3_distilled() -> Any:
    return make_flux3(diffusers.Flux3DistilledAutoBlocks, True)


def _text(pipe: Any, prompt: int) -> dict[str, Any]:
    embeds = {"prompt_embeds": embeddings(prompt, TOKENS, TEXT), "negative_prompt_embeds": embeddings(2, TOKENS, TEXT)}
    return {**embeds, **SQUARE}


def _alone(pipe: Any, prompt: int) -> dict[str, Any]:
    return {"prompt_embeds": embeddings(prompt, TOKENS, TEXT), **SQUARE}


def masked(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**_text(pipe, prompt), "prompt_embeds_mask": ones(1, TOKENS), "negative_prompt_embeds_mask": ones(1, TOKENS)}


def _listed(pipe: Any, prompt: int) -> dict[str, Any]:
    embeds = {
        "prompt_embeds": [embeddings(prompt, TOKENS, TEXT)[0]],
        "negative_prompt_embeds": [embeddings(2, TOKENS, TEXT)[0]],
    }
    return {**embeds, **SQUARE}


def _from_picture(arguments: Any, **more: Any) -> Any:
    return lambda pipe, prompt: {**arguments(pipe, prompt), "image": picture(SIZE, SIZE), **more}


def _drawn_over(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**masked(pipe, prompt), "image": picture(SIZE, SIZE), "mask_image": picture(SIZE, SIZE, 1, "L"), "strength": 0.7}


QWEN, Z_IMAGE, FLUX2, FLUX3 = "Qwen-Image", "Z-Image", "FLUX.2", "FLUX.3"
KINDS = [
    Kind("QwenImageModularPipeline", QWEN, make_qwen, masked, {}, latents=as_given),
    Kind("QwenImageModularPipeline [unguided]", QWEN, make_qwen_unguided, masked, None, {}, latents=as_given),
    Kind("QwenImageModularPipeline [image]", QWEN, make_qwen, _from_picture(masked, strength=0.7), {}, latents=as_given),
    Kind("QwenImageModularPipeline [inpaint]", QWEN, make_qwen, _drawn_over, {}, latents=as_given),
    Kind("ZImageModularPipeline", Z_IMAGE, make_z_image, _listed, None, {}, latents=as_given),
    Kind("ZImageModularPipeline [guided]", Z_IMAGE, lambda: make_z_image(5.0), _listed, {}, latents=as_given),
    Kind(
        "ZImageModularPipeline [image]", Z_IMAGE, make_z_image, _from_picture(_listed, strength=0.7), None, {}, latents=as_given
    ),
    Kind("Flux2ModularPipeline", FLUX2, make_flux2, _alone, latents=as_given),
    Kind("Flux2ModularPipeline [image]", FLUX2, make_flux2, _from_picture(_alone), latents=as_given),
    Kind("Flux2KleinModularPipeline", FLUX2, make_flux2_klein, _alone, latents=as_given),
    Kind("Flux2KleinModularPipeline [base]", FLUX2, make_flux2_klein_base, _text, {}, latents=as_given),
    Kind("Flux3ModularPipeline", FLUX3, make_flux3, _text, {}, latents=as_given),
    Kind("Flux3ModularPipeline [unguided]", FLUX3, make_flux3_unguided, _text, None, {}, latents=as_given),
    Kind("Flux3ModularPipeline [image]", FLUX3, make_flux3, _from_picture(_text), {}, latents=as_given),
    Kind("Flux3DistilledModularPipeline", FLUX3, make_flux3_distilled, _alone, latents=as_given),
]
