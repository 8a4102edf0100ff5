"""Chroma's pipelines, tiny."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, ones, picture
from tests.support.zoo.parts_image import amplify, autoencoder, square

TEXT = 24
SIZE = 16
MODEL: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "axes_dims_rope": (4, 6, 6),
    "approximator_num_channels": 16,
    "approximator_hidden_dim": 32,
    "approximator_layers": 1,
}


def make(name: str) -> Any:
    return getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_beta_sigmas=True),
        vae=autoencoder(4, shift_factor=0.12, scaling_factor=0.36),
        text_encoder=None,
        tokenizer=None,
        transformer=amplify(build(ChromaTransformer2DModel, **MODEL), 3, "attn.add_v_proj"),
    )


def kind(name: str, given: Callable[[], dict[str, Any]] = dict) -> Kind:
    def arguments(pipe: Any, prompt: int) -> dict[str, Any]:
        del pipe
        counts = ones(1, 7, dtype=torch.bool)
        texts = {"prompt_embeds": embeddings(prompt, 7, TEXT), "prompt_attention_mask": counts}
        negative = {"negative_prompt_embeds": embeddings(2, 7, TEXT), "negative_prompt_attention_mask": counts}
        return {**texts, **negative, **square(SIZE), **given(), "output_type": "latent"}

    return Kind(name, "Chroma", lambda: make(name), arguments, guided={}, unguided={"guidance_scale": 1.0})


KINDS = [
    kind("ChromaPipeline"),
    kind("ChromaImg2ImgPipeline", lambda: {"image": picture(SIZE, SIZE), "strength": 0.7}),
]
SKIPPED = {"ChromaInpaintPipeline": "AttributeError: 'FrozenDict' object has no attribute 'guidance_embeds'"}
