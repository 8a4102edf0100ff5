"""Sana's pipelines, tiny."""

from collections.abc import Callable
from typing import Any

import diffusers
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaControlNetModel,
    SanaTransformer2DModel,
    SCMScheduler,
)

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, ones, picture
from tests.support.zoo.parts_image import square

TEXT = 24
SIZE = 32
MODEL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": TEXT,
    "sample_size": 4,
}
SPRINT = {"guidance_embeds": True, "guidance_embeds_scale": 0.1, "qk_norm": "rms_norm_across_heads", "timestep_scale": 1000.0}
LEVELS: dict[str, Any] = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {"block_out_channels": (8,) * 4, "layers_per_block": (1,) * 4, "qkv_multiscales": ((),) * 4}.items()
}


def solver() -> DPMSolverMultistepScheduler:
    """As Sana's."""
    return DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)


def controlnet() -> Any:
    return build(SanaControlNetModel, 1, **{**MODEL, "num_layers": 1})


def make(
    name: str, *, scheduler: Callable[[], Any] = solver, parts: Callable[[], dict[str, Any]] = dict, **changes: Any
) -> Any:
    return getattr(diffusers, name)(
        tokenizer=None,
        text_encoder=None,
        vae=build(AutoencoderDC, 9, latent_channels=4, attention_head_dim=8, scaling_factor=0.41, **LEVELS),
        transformer=build(SanaTransformer2DModel, **{**MODEL, **changes}),
        scheduler=scheduler(),
        **parts(),
    )


def texts(prompt: int) -> dict[str, Any]:
    mine = {"prompt_embeds": embeddings(prompt, 7, TEXT), "prompt_attention_mask": ones(1, 7)}
    return {**mine, "use_resolution_binning": False, **square(SIZE), "output_type": "latent"}


def kind(name: str, given: dict[str, Any], **options: Any) -> Kind:
    negative = {
        "negative_prompt": None,
        "negative_prompt_embeds": embeddings(2, 7, TEXT),
        "negative_prompt_attention_mask": ones(1, 7),
    }
    guidance: dict[str, Any] = {"guided": {}, "unguided": {"guidance_scale": 1.0}}
    return Kind(
        name, "Sana", lambda: make(name, **options), lambda pipe, prompt: {**texts(prompt), **negative, **given}, **guidance
    )


def sprint(name: str, given: dict[str, Any]) -> Kind:
    """It takes its guidance scale as an input."""
    mine = {"intermediate_timesteps": None, **given}
    return Kind(
        name, "Sana", lambda: make(name, scheduler=SCMScheduler, **SPRINT), lambda pipe, prompt: {**texts(prompt), **mine}
    )


KINDS = [
    kind("SanaPipeline", {}),
    kind("SanaControlNetPipeline", {"control_image": picture(SIZE, SIZE)}, parts=lambda: {"controlnet": controlnet()}),
    sprint("SanaSprintPipeline", {}),
    sprint("SanaSprintImg2ImgPipeline", {"image": picture(SIZE, SIZE), "strength": 0.7}),
]
