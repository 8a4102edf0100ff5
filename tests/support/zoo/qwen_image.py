"""Qwen-Image's pipelines, tiny.

A token is 128 pixels wide, as editing pipelines scale what they edit to about a million pixels.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageControlNetModel,
    QwenImageTransformer2DModel,
)

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, ones, picture
from tests.support.zoo.parts_image import Certain, Remembering, amplify, mask, words_and_pictures

TEXT = 24
SIZE = 512
SQUARE: dict[str, Any] = {"height": SIZE, "width": SIZE}
MODEL: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "axes_dims_rope": (4, 6, 6),
}
LAYERED: dict[str, Any] = {"use_layer3d_rope": True, "use_additional_t_cond": True}
GUIDED = {"negative_prompt_embeds": embeddings(2, 5, TEXT), "negative_prompt_embeds_mask": ones(1, 5)}


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """As Qwen-Image's."""
    shifting = {"base_image_seq_len": 256, "max_image_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9}
    return FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True, shift_terminal=0.02, **shifting)


class CertainQwenImage(Certain, AutoencoderKLQwenImage):
    """Qwen-Image's."""


class RememberingQwenImage(Remembering, AutoencoderKLQwenImage):
    """Qwen-Image's."""


def autoencoder(model: type[AutoencoderKLQwenImage] = AutoencoderKLQwenImage) -> Any:
    """It halves pictures six times."""
    sizes: dict[str, Any] = {"base_dim": 2, "z_dim": 4, "num_res_blocks": 0}
    sizes |= {"dim_mult": [1] * 7, "temperal_downsample": [False] * 6}
    sizes |= {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 0.6, 0.7, 0.8]}
    return build(model, 9, **sizes)


def controlnet(extra: int) -> Any:
    """One whose condition has so many channels more than the latents."""
    return build(QwenImageControlNetModel, 1, extra_condition_channels=extra, **{**MODEL, "num_layers": 1})


def make(name: str, *, parts: Callable[[], dict[str, Any]] = dict, **changes: Any) -> Any:
    given: dict[str, Any] = {"scheduler": scheduler(), "vae": autoencoder(), "text_encoder": None, "tokenizer": None}
    if "Edit" in name or "Layered" in name:
        given |= {"processor": None, "vae": autoencoder(RememberingQwenImage)}
    transformer = amplify(build(QwenImageTransformer2DModel, **{**MODEL, **changes}), 3, "attn.to_out.0", "attn.add_v_proj")
    return getattr(diffusers, name)(transformer=transformer, **{**given, **parts()})


def arguments(prompt: int) -> dict[str, Any]:
    tokens = 7 + prompt
    text = {"prompt_embeds": embeddings(prompt, tokens, TEXT), "prompt_embeds_mask": ones(1, tokens)}
    return {**text, "output_type": "latent"}


@cache
def padded(prompt: int) -> dict[str, Any]:
    """Of two pictures, the second with a shorter prompt."""
    counts = ones(2, 7).clone()
    counts[1, 5:] = 0
    both = torch.cat([embeddings(3 * prompt, 7, TEXT), embeddings(3 * prompt + 1, 7, TEXT)])
    return {"prompt_embeds": both, "prompt_embeds_mask": counts}


TWICE: dict[str, Any] = {name: torch.cat([value] * 2) for name, value in GUIDED.items()}


def kind(name: str, given: Callable[[], dict[str, Any]], variant: str = "", **options: Any) -> Kind:
    return Kind(
        f"{name}{variant}",
        "Qwen-Image",
        lambda: make(name, **options),
        lambda pipe, prompt: {**arguments(prompt), **given()},
        guided=GUIDED,
        unguided={},
    )


def one(seed: int = 0) -> dict[str, Any]:
    return {"image": picture(SIZE, SIZE, seed)}


def part(*, strength: float = 0.7) -> dict[str, Any]:
    return {**one(), "mask_image": mask(SIZE), "strength": strength}


def condition() -> dict[str, Any]:
    return {"control_image": picture(SIZE, SIZE, 1), "controlnet_conditioning_scale": 0.8, **SQUARE}


def layers(pipe: Any, prompt: int) -> dict[str, Any]:
    """It asks for a prompt beside embeddings, and cannot return latents."""
    del pipe
    return {**arguments(prompt), **one(), "prompt": "a", "layers": 1, "resolution": 640, "output_type": "pt"}


KINDS = [
    kind("QwenImagePipeline", lambda: SQUARE),
    kind("QwenImagePipeline", lambda: SQUARE, " [two prompts]")._replace(
        arguments=lambda pipe, prompt: {**padded(prompt), **SQUARE, "output_type": "latent"}, guided=TWICE
    ),
    kind("QwenImageImg2ImgPipeline", lambda: {**one(), "strength": 0.7, **SQUARE}),
    kind("QwenImageInpaintPipeline", lambda: {**part(), **SQUARE}),
    kind("QwenImageEditPipeline", lambda: {**one(), **SQUARE}),
    kind("QwenImageEditInpaintPipeline", part),
    kind("QwenImageEditPlusPipeline", lambda: {**one(), **SQUARE}),
    kind(
        "QwenImageEditPlusPipeline",
        lambda: {"image": [picture(SIZE, SIZE), picture(SIZE, SIZE // 2, 1)], **SQUARE},
        variant=" [2511, two images]",
        zero_cond_t=True,
    ),
    kind("QwenImageControlNetPipeline", condition, parts=lambda: {"controlnet": controlnet(0)}),
    kind(
        "QwenImageControlNetInpaintPipeline",
        lambda: {**condition(), "control_mask": mask(SIZE)},
        parts=lambda: {"controlnet": controlnet(4), "vae": autoencoder(CertainQwenImage)},
    ),
    kind("QwenImageLayeredPipeline", dict, parts=lambda: {"text_encoder": words_and_pictures(16)}, **LAYERED)._replace(
        arguments=layers
    ),
]
