"""Mochi, tiny; its timesteps grow."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, ones

TEXT, TOKENS = 16, 6


def make() -> Any:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3, "in_channels": 4}
    sizes |= {"pooled_projection_dim": 16, "text_embed_dim": TEXT, "time_embed_dim": 16}
    absent: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return MochiPipeline(scheduler=scheduler, transformer=build(MochiTransformer3DModel, **sizes), **absent)


def _text(pipe: Any, prompt: int) -> dict[str, Any]:
    embeds = {"prompt_embeds": embeddings(prompt, TOKENS, TEXT), "negative_prompt_embeds": embeddings(2, TOKENS, TEXT)}
    mask = ones(1, TOKENS, dtype=torch.bool)
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    return {**embeds, **masks, "width": 64, "height": 32, "num_frames": 13, "output_type": "latent"}


KINDS = [Kind("MochiPipeline", "Mochi", make, _text, {"guidance_scale": 4.5}, {"guidance_scale": 1.0})]
