"""Stable Diffusion 3's pipelines, tiny."""

from collections.abc import Callable
from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler, SD3ControlNetModel, SD3Transformer2DModel

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, picture
from tests.support.zoo.parts_image import CertainKL, amplify, autoencoder, mask, pooled

TEXT = 24
POOLED = 12
SIZE = 16
SQUARE: dict[str, Any] = {"height": SIZE, "width": SIZE}
MODEL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "caption_projection_dim": 32,
    "pooled_projection_dim": POOLED,
    "pos_embed_max_size": 8,
}
MEDIUM = {"num_layers": 3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
SKIPPING = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.5}


def controlnet(**changes: Any) -> Any:
    return build(SD3ControlNetModel, 1, **{**MODEL, "num_layers": 1, **changes})


def make(name: str, *, parts: Callable[[], dict[str, Any]] = dict, **changes: Any) -> Any:
    texts = {f"{part}{suffix}": None for part in ("text_encoder", "tokenizer") for suffix in ("", "_2", "_3")}
    vae = autoencoder(
        16, model=CertainKL if "ControlNet" in name else diffusers.AutoencoderKL, shift_factor=0.06, scaling_factor=1.5
    )
    transformer = build(SD3Transformer2DModel, **{**MODEL, **changes})
    given = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "vae": vae, **texts, **parts()}
    return getattr(diffusers, name)(transformer=amplify(transformer, 2, "attn.add_v_proj"), **given)


def arguments(prompt: int) -> dict[str, Any]:
    return {
        "prompt_embeds": embeddings(prompt, 7, TEXT),
        "pooled_prompt_embeds": pooled(prompt, POOLED),
        "negative_prompt_embeds": embeddings(2, 7, TEXT),
        "negative_pooled_prompt_embeds": pooled(2, POOLED),
        "output_type": "latent",
    }


def kind(name: str, given: Callable[[], dict[str, Any]], variant: str = "", **options: Any) -> Kind:
    return Kind(
        f"StableDiffusion3{name}Pipeline{variant}",
        "Stable Diffusion 3",
        lambda: make(f"StableDiffusion3{name}Pipeline", **options),
        lambda pipe, prompt: {**arguments(prompt), **given()},
        guided={},
        unguided={"guidance_scale": 1.0},
    )


def condition() -> dict[str, Any]:
    return {"control_image": picture(SIZE, SIZE, 1), "controlnet_conditioning_scale": 0.8, **SQUARE}


KINDS = [
    kind("", lambda: SQUARE),
    kind("", lambda: SQUARE, " [3.5 medium]", **MEDIUM),
    kind("", lambda: {**SQUARE, **SKIPPING}, " [3.5 medium, skipped layers]", **MEDIUM),
    kind("PAG", lambda: {**SQUARE, "pag_scale": 0.7}, parts=lambda: {"pag_applied_layers": ["blocks.0"]})._replace(
        unguided={"guidance_scale": 1.0, "pag_scale": 0.0}
    ),
    kind("Img2Img", lambda: {"image": picture(SIZE, SIZE), "strength": 0.7, **SQUARE}),
    kind("Inpaint", lambda: {"image": picture(SIZE, SIZE), "mask_image": mask(SIZE), "strength": 0.7, **SQUARE}),
    kind("ControlNet", condition, parts=lambda: {"controlnet": controlnet()}),
    kind(
        "ControlNet",
        condition,
        " [3.5 large]",
        parts=lambda: {"controlnet": controlnet(joint_attention_dim=None, qk_norm="rms_norm")},
        qk_norm="rms_norm",
    ),
    kind(
        "ControlNetInpainting",
        lambda: {**condition(), "control_mask": mask(SIZE)},
        parts=lambda: {"controlnet": controlnet(extra_conditioning_channels=1)},
    ),
]
