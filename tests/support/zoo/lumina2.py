"""Lumina 2's pipeline, tiny. Its autoencoder is taken to make latents eight times smaller than pictures."""

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, ones
from tests.support.zoo.parts_image import amplify, autoencoder, square

TEXT = 24
MODEL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "hidden_size": 32,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "multiple_of": 16,
    "axes_dim_rope": (4, 6, 6),
    "axes_lens": (64, 32, 32),
    "cap_feat_dim": TEXT,
}


def make() -> Any:
    return Lumina2Pipeline(
        transformer=amplify(build(Lumina2Transformer2DModel, **MODEL), 8, "timestep_embedder.linear_1"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder(4, 4, shift_factor=0.12, scaling_factor=0.36),
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        tokenizer=None,  # pyright: ignore[reportArgumentType]
    )


def arguments(pipe: Any, prompt: int) -> dict[str, Any]:
    del pipe
    texts = {"prompt_embeds": embeddings(prompt, 7, TEXT), "prompt_attention_mask": ones(1, 7)}
    negative = {"negative_prompt_embeds": embeddings(2, 7, TEXT), "negative_prompt_attention_mask": ones(1, 7)}
    return {**texts, **negative, **square(64), "output_type": "latent"}


def truncated(pipe: Any, prompt: int) -> dict[str, Any]:
    """The last steps are not guided."""
    return {**arguments(pipe, prompt), "cfg_trunc_ratio": 0.5}


GUIDANCE: dict[str, Any] = {"guided": {}, "unguided": {"guidance_scale": 1.0}}

KINDS = [
    Kind("Lumina2Pipeline", "Lumina 2", make, arguments, **GUIDANCE),
    Kind("Lumina2Pipeline [truncated guidance]", "Lumina 2", make, truncated, **GUIDANCE),
]
