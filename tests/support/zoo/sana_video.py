"""Sana Video, tiny: text and image."""

from typing import Any

from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaImageToVideoPipeline,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)

from tests.support.zoo import wan
from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, ones, picture
from tests.support.zoo.wan import CHANNELS, FRAMES, HEIGHT, TEXT, WIDTH

TOKENS = 6
ON, OFF = {"guidance_scale": 6.0}, {"guidance_scale": 1.0}


def _make(pipeline: Any, scheduler: Any) -> Any:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "cross_attention_dim": 24}
    sizes |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "caption_channels": TEXT, "rope_max_seq_len": 32}
    sizes |= {"in_channels": CHANNELS, "out_channels": CHANNELS}
    return pipeline(**{**wan.parts(build(SanaVideoTransformer3DModel, **sizes)), "scheduler": scheduler})


def make_text() -> Any:
    flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 8.0}
    return _make(SanaVideoPipeline, DPMSolverMultistepScheduler(**flow))


def make_image() -> Any:
    return _make(SanaImageToVideoPipeline, FlowMatchEulerDiscreteScheduler(shift=8.0))


def _text(pipe: Any, prompt: int) -> dict[str, Any]:
    embeds = {"prompt_embeds": embeddings(prompt, TOKENS, TEXT), "negative_prompt_embeds": embeddings(2, TOKENS, TEXT)}
    masks = {"prompt_attention_mask": ones(1, TOKENS), "negative_prompt_attention_mask": ones(1, TOKENS)}
    size = {"width": WIDTH, "height": HEIGHT, "frames": FRAMES, "use_resolution_binning": False, "negative_prompt": None}
    return {**embeds, **masks, **size, "output_type": "latent"}


def _image(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**_text(pipe, prompt), "image": picture(WIDTH, HEIGHT)}


KINDS = [
    Kind("SanaVideoPipeline", "Sana Video", make_text, _text, ON, OFF),
    Kind("SanaImageToVideoPipeline", "Sana Video", make_image, _image, ON, OFF),
]
