"""GLM-Image's pipeline, tiny. Tokens that a language model would draw first are given; each lies under a token of the image."""

from typing import Any

import torch
from diffusers import GlmImagePipeline, GlmImageTransformer2DModel

from tests.support.zoo.cogview4 import scheduler
from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, noise, picture
from tests.support.zoo.parts_image import autoencoder, square

TEXT = 24
SIZE = 16
CODES = 32
MODEL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "text_embed_dim": TEXT,
    "time_embed_dim": 32,
    "condition_dim": 8,
    "prior_vq_quantizer_codebook_size": CODES,
}


def make() -> Any:
    return GlmImagePipeline(
        tokenizer=None,  # pyright: ignore[reportArgumentType]
        processor=None,  # pyright: ignore[reportArgumentType]
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        vision_language_encoder=None,  # pyright: ignore[reportArgumentType]
        vae=autoencoder(4, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 0.6, 0.7, 0.8]),
        transformer=build(GlmImageTransformer2DModel, **MODEL),
        scheduler=scheduler(),
    )


def codes(prompt: int) -> torch.Tensor:
    return (noise(1, SIZE, seed=300 + prompt) * 1000).long() % CODES


def arguments(pipe: Any, prompt: int) -> dict[str, Any]:
    del pipe
    texts = {"prompt_embeds": embeddings(prompt, 7, TEXT), "negative_prompt_embeds": embeddings(2, 7, TEXT)}
    return {**texts, "prior_token_ids": codes(prompt), **square(SIZE), "output_type": "latent"}


def edit(pipe: Any, prompt: int) -> dict[str, Any]:
    """What is edited is seen before the first step, and remembered."""
    seen = {"prior_token_image_ids": [codes(5)[0]], "source_image_grid_thw": [torch.tensor([[1, 4, 4]])]}
    return {**arguments(pipe, prompt), **seen, "image": [picture(SIZE, SIZE)]}


GUIDANCE: dict[str, Any] = {"guided": {}, "unguided": {"guidance_scale": 1.0}}

KINDS = [
    Kind("GlmImagePipeline", "GLM-Image", make, arguments, **GUIDANCE),
    Kind("GlmImagePipeline [edit]", "GLM-Image", make, edit, **GUIDANCE),
]
