"""MiniMax-H3, tiny: video and audio, each on a schedule of its own, of text, of a keyframe, and of references."""

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import MiniMaxH3Scheduler, MiniMaxH3Transformer3DModel
from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import (
    MiniMaxH3FL2VACoreDenoiseStep,
    MiniMaxH3Ref2VACoreDenoiseStep,
)
from diffusers.modular_pipelines.minimax_h3.references import MiniMaxH3AudioReference, MiniMaxH3ImageReference

from tests.support.zoo.kind import Kind
from tests.support.zoo.modular import OUTSIDE, as_given, assemble
from tests.support.zoo.parts import build, embeddings, noise, ones, picture

NAME, FAMILY = "MiniMaxH3ModularPipeline", "MiniMax-H3"
TEXT, TOKENS, CHANNELS, AUDIO_CHANNELS = 16, 24, 24, 32
SIZE, FRAMES = 32, 124
SHIFT, AUDIO_SHIFT = 12.0, 3.0


def make(*names: str, blocks: Any = diffusers.MiniMaxH3Blocks, kind: type = MiniMaxH3Transformer3DModel) -> Any:
    """With a transformer in each place that is named; conditions are given as latents."""
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "hidden_size": 24, "num_layers": 2}
    sizes |= {"num_refiner_layers": 1, "ffn_dim": 32, "text_dim": TEXT, "freq_dim": 16, "time_embed_hidden_dim": 16}
    sizes |= {"time_embed_dim": 16, "rope_freq_dim": 2}
    schedulers = {"scheduler": MiniMaxH3Scheduler(SHIFT), "audio_scheduler": MiniMaxH3Scheduler(AUDIO_SHIFT)}
    transformers = {name: build(kind, seed, gain=1.2, **sizes) for seed, name in enumerate(names)}
    return assemble(blocks, (*OUTSIDE, "vae_encoder"), **transformers, **schedulers)


def text(pipe: Any, prompt: int) -> dict[str, Any]:
    embeds = {"prompt_embeds": embeddings(prompt, TOKENS, TEXT), "text_token_tags": ones(TOKENS) * pipe.text_tag}
    size = {"width": SIZE, "height": SIZE, "num_frames": FRAMES}
    return {**embeds, **size, "output": ["latents", "audio_latents"]}


def _image() -> torch.Tensor:
    return noise(1, CHANNELS, 1, SIZE // 16, SIZE // 16, seed=300)


def _keyframe(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**text(pipe, prompt), "condition_latents": [_image()], "keyframe_anchors": ("first",)}


def _references(pipe: Any, prompt: int) -> dict[str, Any]:
    references = [MiniMaxH3ImageReference(picture(SIZE, SIZE)), MiniMaxH3AudioReference(noise(2, 64, seed=301), 32000)]
    sound = noise(2 * 6, AUDIO_CHANNELS, seed=302)
    given = {"condition_latents": [_image()], "audio_condition_latents": [sound]}
    return {**text(pipe, prompt), "normalized_references": references, **given}


make_text = partial(make, "transformer")
make_keyframe = partial(make, "transformer", blocks=MiniMaxH3FL2VACoreDenoiseStep)
make_references = partial(make, "transformer_ref", blocks=MiniMaxH3Ref2VACoreDenoiseStep)
make_both = partial(make, "transformer", "transformer_ref")
KINDS = [
    Kind(NAME, FAMILY, make_text, text, latents=as_given),
    Kind(f"{NAME} [keyframe]", FAMILY, make_keyframe, _keyframe, latents=as_given),
    Kind(f"{NAME} [references]", FAMILY, make_references, _references, latents=as_given),
    Kind(f"{NAME} [both]", FAMILY, make_both, text, latents=as_given),
]
