"""Kandinsky 5, tiny: videos and images, of text and of an image."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2IPipeline,
    Kandinsky5I2VPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, noise, picture
from tests.support.zoo.parts_video import first_of

CHANNELS, TEXT, POOLED, TOKENS = 4, 16, 8, 6
WIDTH, HEIGHT, FRAMES = 64, 32, 9
FAMILY = "Kandinsky 5"
ON, OFF = {"guidance_scale": 3.5}, {"guidance_scale": 1.0}
NAMES = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def _transformer(conditioned: bool) -> Any:
    sizes: dict[str, Any] = {"in_visual_dim": CHANNELS, "out_visual_dim": CHANNELS, "in_text_dim": TEXT, "in_text_dim2": POOLED}
    sizes |= {"time_dim": 16, "model_dim": 24, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2}
    return build(Kandinsky5Transformer3DModel, axes_dims=(4, 4, 4), visual_cond=conditioned, **sizes)


def _video(pipeline: Any) -> Any:
    blocks: dict[str, Any] = {"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2}
    vae = build(AutoencoderKLHunyuanVideo, 1, latent_channels=CHANNELS, **blocks)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    return pipeline(transformer=_transformer(True), vae=vae, scheduler=scheduler, **dict.fromkeys(NAMES))


def _image(pipeline: Any, conditioned: bool) -> Any:
    blocks: dict[str, Any] = {"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2}
    blocks |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = build(AutoencoderKL, 1, latent_channels=CHANNELS, **blocks)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = pipeline(transformer=_transformer(conditioned), vae=vae, scheduler=scheduler, **dict.fromkeys(NAMES))
    pipe.resolutions = [(WIDTH, HEIGHT)]
    return pipe


def _square(pipe: Any, prompt: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {"width": WIDTH, "height": HEIGHT, "output_type": "latent"}
    for prefix, index in (("", prompt), ("negative_", 2)):
        arguments[prefix + "prompt_embeds_qwen"] = embeddings(index, TOKENS, TEXT)
        arguments[prefix + "prompt_embeds_clip"] = noise(1, POOLED, seed=200 + index)
        arguments[prefix + "prompt_cu_seqlens"] = torch.tensor([0, TOKENS], dtype=torch.int32)
    return arguments


def _frames(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**_square(pipe, prompt), "num_frames": FRAMES}


def _moving(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**_square(pipe, prompt), "num_frames": 21, "image": picture(WIDTH, HEIGHT)}


def _edited(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**_square(pipe, prompt), "image": picture(WIDTH, HEIGHT)}


def make_edit() -> Any:
    return _image(Kandinsky5I2IPipeline, True)


KINDS = [
    Kind("Kandinsky5T2VPipeline", FAMILY, lambda: _video(Kandinsky5T2VPipeline), _frames, ON, OFF),
    Kind("Kandinsky5I2VPipeline", FAMILY, lambda: _video(Kandinsky5I2VPipeline), _moving, ON, OFF),
    Kind("Kandinsky5T2IPipeline", FAMILY, lambda: _image(Kandinsky5T2IPipeline, False), _square, ON, OFF, latents=first_of),
    Kind("Kandinsky5I2IPipeline", FAMILY, make_edit, _edited, ON, OFF, latents=first_of),
]
SKIPPED = {"attention_type='nabla'": "takes flex attention, and blocks of 8 by 8 patches"}
