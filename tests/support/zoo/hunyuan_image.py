"""HunyuanImage 2.1's pipelines, tiny. Who guides is a component, not an argument."""

from typing import Any

import diffusers
from diffusers import AutoencoderKLHunyuanImage, FlowMatchEulerDiscreteScheduler, HunyuanImageTransformer2DModel
from diffusers.guiders import AdaptiveProjectedMixGuidance

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, noise, ones
from tests.support.zoo.parts_image import amplify, square

TEXT = 32
GLYPHS = 16
MODEL: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": TEXT,
    "text_embed_2_dim": GLYPHS,
    "rope_axes_dim": (8, 8),
}
REFINER = {
    "in_channels": 16,
    "patch_size": (1, 1, 1),
    "text_embed_2_dim": None,
    "rope_axes_dim": (4, 6, 6),
    "guidance_embeds": True,
}


LOUD = ("attn.add_v_proj", "attn.to_out.0", "norm1.linear", "norm1_context.linear")


def transformer(**changes: Any) -> Any:
    return amplify(build(HunyuanImageTransformer2DModel, **{**MODEL, **changes}), 3, *LOUD)


def guide(start: int) -> AdaptiveProjectedMixGuidance:
    """As HunyuanImage's: plain guidance at first, projected guidance later."""
    projected: dict[str, Any] = {"adaptive_projected_guidance_scale": 10.0, "adaptive_projected_guidance_momentum": -0.5}
    return AdaptiveProjectedMixGuidance(3.5, adaptive_projected_guidance_start_step=start, **projected)


def make(*, shift: float = 5.0, guided: bool = True, **changes: Any) -> Any:
    sizes: dict[str, Any] = {"block_out_channels": (32, 32), "layers_per_block": 1, "spatial_compression_ratio": 2}
    return diffusers.HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=build(AutoencoderKLHunyuanImage, 9, in_channels=3, out_channels=3, latent_channels=8, sample_size=16, **sizes),
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        tokenizer=None,  # pyright: ignore[reportArgumentType]
        text_encoder_2=None,  # pyright: ignore[reportArgumentType]
        tokenizer_2=None,  # pyright: ignore[reportArgumentType]
        transformer=transformer(**changes),
        guider=guide(3) if guided else None,
        ocr_guider=guide(4) if guided else None,
    )


def refiner() -> Any:
    """It is given latents, so it needs no autoencoder."""
    return diffusers.HunyuanImageRefinerPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
        vae=None,  # pyright: ignore[reportArgumentType]
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        tokenizer=None,  # pyright: ignore[reportArgumentType]
        transformer=transformer(**REFINER),
    )


def texts(prompt: int, prefix: str = "") -> dict[str, Any]:
    return {
        f"{prefix}prompt_embeds": embeddings(prompt, 7, TEXT),
        f"{prefix}prompt_embeds_mask": ones(1, 7),
    }


def glyphs(prompt: int, prefix: str = "") -> dict[str, Any]:
    return {f"{prefix}prompt_embeds_2": embeddings(50 + prompt, 5, GLYPHS), f"{prefix}prompt_embeds_mask_2": ones(1, 5)}


def arguments(pipe: Any, prompt: int) -> dict[str, Any]:
    del pipe
    both = {**texts(prompt), **texts(2, "negative_"), **glyphs(prompt), **glyphs(2, "negative_")}
    return {**both, **square(8), "output_type": "latent"}


def refined(pipe: Any, prompt: int) -> dict[str, Any]:
    del pipe
    return {**texts(prompt), "image": noise(1, 8, 1, 4, 4, seed=7), **square(64), "output_type": "latent"}


def distilled() -> Any:
    return make(shift=4.0, guided=False, guidance_embeds=True, use_meanflow=True)


FAMILY = "HunyuanImage 2.1"
KINDS = [
    Kind("HunyuanImagePipeline", FAMILY, make, arguments, guided={}),
    Kind("HunyuanImagePipeline [no guider]", FAMILY, lambda: make(guided=False), arguments, unguided={}),
    Kind("HunyuanImagePipeline [distilled]", FAMILY, distilled, arguments, unguided={}),
    Kind("HunyuanImageRefinerPipeline", FAMILY, refiner, refined, unguided={}),
]
