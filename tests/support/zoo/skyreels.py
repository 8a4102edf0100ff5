"""SkyReels V2, tiny: all frames at once, and diffusion forcing, where each frame has a timestep of its own."""

from typing import Any

from diffusers import (
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
)

from tests.support.zoo import wan
from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build
from tests.support.zoo.wan import CHANNELS, IMAGE, OFF, ON

FAMILY = "SkyReels V2"


def _parts(**changes: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 32}
    sizes |= {"in_channels": CHANNELS, "out_channels": CHANNELS, "text_dim": wan.TEXT, "freq_dim": 16, "rope_max_seq_len": 32}
    return wan.parts(build(SkyReelsV2Transformer3DModel, **{**sizes, **changes}), 8.0)


def make_text() -> Any:
    return SkyReelsV2Pipeline(**_parts())


def make_image() -> Any:
    image = {"in_channels": 2 * CHANNELS + 4, "image_dim": IMAGE, "added_kv_proj_dim": 24}
    return SkyReelsV2ImageToVideoPipeline(**_parts(**image), **wan.image_encoder())


def make_forcing() -> Any:
    return SkyReelsV2DiffusionForcingPipeline(**_parts(inject_sample_info=True))


def make_forcing_image() -> Any:
    return SkyReelsV2DiffusionForcingImageToVideoPipeline(**_parts(inject_sample_info=True))


def _forced(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**wan.text(pipe, prompt), "prompt": None}


def _staggered(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**_forced(pipe, prompt), "ar_step": 2, "causal_block_size": 1}


KINDS = [
    Kind("SkyReelsV2Pipeline", FAMILY, make_text, wan.text, ON, OFF),
    Kind("SkyReelsV2ImageToVideoPipeline", FAMILY, make_image, wan.image, ON, OFF),
    Kind("SkyReelsV2DiffusionForcingPipeline", FAMILY, make_forcing, _forced, ON, OFF),
    Kind("SkyReelsV2DiffusionForcingPipeline [staggered]", FAMILY, make_forcing, _staggered, ON, OFF),
    Kind("SkyReelsV2DiffusionForcingImageToVideoPipeline", FAMILY, make_forcing_image, wan.image, ON, OFF),
]
