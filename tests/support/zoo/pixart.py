"""PixArt's pipelines, tiny. They predict noise, and a variance that is thrown away."""

from typing import Any

from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, ones
from tests.support.zoo.parts_image import autoencoder, echo, square

TEXT = 24
MODEL: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "cross_attention_dim": 32,
    "sample_size": 8,
    "caption_channels": TEXT,
}


def make(pipeline: Any, **changes: Any) -> Any:
    transformer = build(PixArtTransformer2DModel, **MODEL, **changes)
    return pipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder(4, scaling_factor=0.13),
        transformer=echo(transformer, transformer.proj_out),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )


def arguments(pipe: Any, prompt: int) -> dict[str, Any]:
    del pipe
    texts = {"prompt_embeds": embeddings(prompt, 7, TEXT), "prompt_attention_mask": ones(1, 7)}
    negative = {"negative_prompt_embeds": embeddings(2, 7, TEXT), "negative_prompt_attention_mask": ones(1, 7)}
    size = {**square(16), "use_resolution_binning": False, "clean_caption": False}
    return {**texts, **negative, "negative_prompt": None, **size, "output_type": "latent"}


def kind(pipeline: Any, family: str, **changes: Any) -> Kind:
    guidance: dict[str, Any] = {"guided": {}, "unguided": {"guidance_scale": 1.0}}
    return Kind(pipeline.__name__, family, lambda: make(pipeline, **changes), arguments, **guidance)


KINDS = [
    kind(PixArtSigmaPipeline, "PixArt-Sigma", use_additional_conditions=False),
    kind(PixArtAlphaPipeline, "PixArt-Alpha", use_additional_conditions=False),
]
