"""Krea 2's pipeline, tiny. Its text encoder gives several layers of each token."""

from typing import Any

from diffusers import AutoencoderKLQwenImage, Krea2Pipeline, Krea2Transformer2DModel

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, noise, ones
from tests.support.zoo.parts_image import flux_scheduler, square

TEXT = 16
LAYERS = 3
MODEL: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "timestep_embed_dim": 32,
    "text_hidden_dim": TEXT,
    "num_text_layers": LAYERS,
    "text_num_attention_heads": 2,
    "text_num_key_value_heads": 2,
    "text_intermediate_size": 24,
    "num_layerwise_text_blocks": 1,
    "num_refiner_text_blocks": 1,
    "axes_dims_rope": (4, 6, 6),
}
VAE: dict[str, Any] = {"base_dim": 2, "z_dim": 4, "num_res_blocks": 0, "dim_mult": [1, 1], "temperal_downsample": [False]}


def make(*, is_distilled: bool = False) -> Any:
    return Krea2Pipeline(
        scheduler=flux_scheduler(max_image_seq_len=6400),
        vae=build(AutoencoderKLQwenImage, 9, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 0.6, 0.7, 0.8], **VAE),
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        tokenizer=None,  # pyright: ignore[reportArgumentType]
        transformer=build(Krea2Transformer2DModel, **MODEL),
        text_encoder_select_layers=tuple(range(LAYERS)),
        is_distilled=is_distilled,
    )


def layers(prompt: int, tokens: int = 7) -> Any:
    return noise(1, tokens, LAYERS, TEXT, seed=100 + prompt)


def arguments(pipe: Any, prompt: int) -> dict[str, Any]:
    negative = {"negative_prompt_embeds": layers(2), "negative_prompt_embeds_mask": ones(1, 7).bool()}
    guidance = {"guidance_scale": 0.0} if pipe.config.is_distilled else negative
    texts = {"prompt_embeds": layers(prompt), "prompt_embeds_mask": ones(1, 7).bool()}
    return {**texts, **guidance, **square(16), "output_type": "latent"}


KINDS = [
    Kind("Krea2Pipeline", "Krea 2", make, arguments, guided={}, unguided={"guidance_scale": 0.0}),
    Kind("Krea2Pipeline [Turbo]", "Krea 2", lambda: make(is_distilled=True), arguments, unguided={}),
]
