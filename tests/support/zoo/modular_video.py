"""Modular pipelines of videos, tiny: Wan, LTX-Video, LTX-2 and HunyuanVideo 1.5."""

from typing import Any

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance, LTX2Guidance

from tests.support.zoo import hunyuan_video, ltx, ltx2, wan
from tests.support.zoo.kind import Kind
from tests.support.zoo.modular import OUTSIDE, as_given, assemble, take
from tests.support.zoo.parts import picture, tokenizer

WAN_CHANNELS = 16


def make_wan(guider: Any = None) -> Any:
    guiders = {} if guider is None else {"guider": guider}
    return assemble(diffusers.WanBlocks, **take(wan.make_text(WAN_CHANNELS), "transformer", "scheduler"), **guiders)


def make_wan_unguided() -> Any:
    return make_wan(ClassifierFreeGuidance(enabled=False))


def make_wan_experts() -> Any:
    pipe = wan.make_experts(WAN_CHANNELS)
    return assemble(diffusers.Wan22Blocks, **take(pipe, "transformer", "transformer_2", "scheduler"))


def make_wan_image() -> Any:
    names = ("vae", "transformer", "scheduler", "image_encoder", "image_processor")
    return assemble(diffusers.WanImage2VideoAutoBlocks, **take(wan.make_image(), *names))


def make_ltx() -> Any:
    return assemble(diffusers.LTXAutoBlocks, **take(ltx.make(), "vae", "transformer", "scheduler"))


def make_ltx2() -> Any:
    """Its connectors stay, as they are a part of the model."""
    blocks = diffusers.LTX2AutoBlocks()
    blocks.sub_blocks["text_encoder"].sub_blocks.pop("text_encoder")
    guidance = {"stg_scale": 1.0, "modality_scale": 3.0, "guidance_rescale": 0.7, "spatio_temporal_guidance_blocks": [1]}
    guiders = {
        "guider": LTX2Guidance(guidance_scale=3.0, **guidance),
        "audio_guider": LTX2Guidance(guidance_scale=7.0, **guidance),
    }
    names = ("vae", "audio_vae", "transformer", "scheduler", "connectors")
    outside = tuple(name for name in OUTSIDE if name != "text_encoder")
    return assemble(
        blocks, outside, tokenizer=tokenizer(padding_side="left"), **take(ltx2.make_text_perturbed(), *names), **guiders
    )


def make_hunyuan() -> Any:
    pipe = hunyuan_video.make_image_15()
    names = ("vae", "transformer", "scheduler", "image_encoder", "feature_extractor")
    return assemble(diffusers.HunyuanVideo15AutoBlocks, **take(pipe, *names))


def modular(arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**{name: value for name, value in arguments.items() if name != "output_type"}, "output": "latents", **more}


def wan_text(pipe: Any, prompt: int) -> dict[str, Any]:
    return modular(wan.text(pipe, prompt))


def _wan_image(pipe: Any, prompt: int) -> dict[str, Any]:
    return modular(wan.text(pipe, prompt), image=picture(wan.WIDTH, wan.HEIGHT))


def _ltx(pipe: Any, prompt: int) -> dict[str, Any]:
    return modular(ltx.text(pipe, prompt))


def _ltx_image(pipe: Any, prompt: int) -> dict[str, Any]:
    return modular(ltx.text(pipe, prompt), image=picture(ltx.WIDTH, ltx.HEIGHT))


def _ltx2(pipe: Any, prompt: int) -> dict[str, Any]:
    arguments = {name: value for name, value in ltx2.text(pipe, prompt).items() if name not in ltx2.PLAIN}
    return modular(arguments, batch_size=1, dtype=torch.float32, output=["latents", "audio_latents"])


def _hunyuan(pipe: Any, prompt: int) -> dict[str, Any]:
    arguments = hunyuan_video.text_15(pipe, prompt)
    return modular(arguments, batch_size=1)


def _hunyuan_image(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**_hunyuan(pipe, prompt), "image": picture(128, 64)}


KINDS = [
    Kind("WanModularPipeline", "Wan 2.1", make_wan, wan_text, {}, latents=as_given),
    Kind("WanModularPipeline [unguided]", "Wan 2.1", make_wan_unguided, wan_text, None, {}, latents=as_given),
    Kind("Wan22ModularPipeline", "Wan 2.2", make_wan_experts, wan_text, {}, latents=as_given),
    Kind("WanImage2VideoModularPipeline", "Wan 2.1", make_wan_image, _wan_image, {}, latents=as_given),
    Kind("LTXModularPipeline", "LTX-Video", make_ltx, _ltx, {}, latents=as_given),
    Kind("LTXModularPipeline [image]", "LTX-Video", make_ltx, _ltx_image, {}, latents=as_given),
    Kind("LTX2ModularPipeline", "LTX-2", make_ltx2, _ltx2, {}, latents=as_given),
    Kind("HunyuanVideo15ModularPipeline", "HunyuanVideo 1.5", make_hunyuan, _hunyuan, {}, latents=as_given),
    Kind("HunyuanVideo15ModularPipeline [image]", "HunyuanVideo 1.5", make_hunyuan, _hunyuan_image, {}, latents=as_given),
]
