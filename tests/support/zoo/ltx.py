"""LTX-Video, tiny: text, image, and conditions at any frame."""

from typing import Any

from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, noise, ones, picture
from tests.support.zoo.parts_video import clip

CHANNELS, TEXT, TOKENS = 8, 16, 6
WIDTH, HEIGHT, FRAMES = 128, 64, 17
ON, OFF = {"guidance_scale": 3.0}, {"guidance_scale": 1.0}


def make(pipeline: Any = None) -> Any:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24, "num_layers": 2}
    sizes |= {"in_channels": CHANNELS, "out_channels": CHANNELS, "caption_channels": TEXT}
    blocks: dict[str, Any] = {"block_out_channels": (4, 4, 4, 4), "decoder_block_out_channels": (4, 4, 4, 4)}
    blocks |= {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5, "latent_channels": CHANNELS}
    shifts = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024}
    if pipeline is not LTXConditionPipeline:
        shifts |= {"use_dynamic_shifting": True, "shift_terminal": 0.1}
    absent: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
    return (pipeline or LTXPipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler(**shifts),
        vae=build(AutoencoderKLLTXVideo, 1, **blocks),
        **absent,
        transformer=build(LTXVideoTransformer3DModel, **sizes),
    )


def text(pipe: Any, prompt: int) -> dict[str, Any]:
    embeds = {"prompt_embeds": embeddings(prompt, TOKENS, TEXT), "negative_prompt_embeds": embeddings(2, TOKENS, TEXT)}
    masks = {"prompt_attention_mask": ones(1, TOKENS), "negative_prompt_attention_mask": ones(1, TOKENS)}
    size = {"width": WIDTH, "height": HEIGHT, "num_frames": FRAMES}
    return {**embeds, **masks, **size, "output_type": "latent"}


def _image(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**text(pipe, prompt), "image": picture(WIDTH, HEIGHT)}


def _conditions(pipe: Any, prompt: int) -> dict[str, Any]:
    first = LTXVideoCondition(image=picture(WIDTH, HEIGHT), frame_index=0)
    later = LTXVideoCondition(video=clip(WIDTH, HEIGHT, 9), frame_index=8, strength=0.8)
    return {**text(pipe, prompt), "conditions": [first, later]}


def _video(pipe: Any, prompt: int) -> dict[str, Any]:
    latents = noise(1, CHANNELS, 3, HEIGHT // 32, WIDTH // 32, seed=3)
    return {**text(pipe, prompt), "latents": latents, "denoise_strength": 0.7}


KINDS = [
    Kind("LTXPipeline", "LTX-Video", make, text, ON, OFF),
    Kind("LTXPipeline [rescaled]", "LTX-Video", make, text, {**ON, "guidance_rescale": 0.7}, OFF),
    Kind("LTXImageToVideoPipeline", "LTX-Video", lambda: make(LTXImageToVideoPipeline), _image, ON, OFF),
    Kind("LTXConditionPipeline", "LTX-Video", lambda: make(LTXConditionPipeline), text, ON, OFF),
    Kind("LTXConditionPipeline [conditions]", "LTX-Video", lambda: make(LTXConditionPipeline), _conditions, ON, OFF),
    Kind("LTXConditionPipeline [video to video]", "LTX-Video", lambda: make(LTXConditionPipeline), _video, ON, OFF),
]
