"""Ovis-Image's pipeline, tiny."""

from typing import Any

from diffusers import OvisImagePipeline, OvisImageTransformer2DModel

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings
from tests.support.zoo.parts_image import amplify, autoencoder, flux_scheduler, square

TEXT = 24
MODEL: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "axes_dims_rope": (4, 6, 6),
}


def make() -> Any:
    return OvisImagePipeline(
        scheduler=flux_scheduler(),
        vae=autoencoder(4, shift_factor=0.12, scaling_factor=0.36),
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        tokenizer=None,  # pyright: ignore[reportArgumentType]
        transformer=amplify(build(OvisImageTransformer2DModel, **MODEL), 3, "attn.add_v_proj"),
    )


def arguments(pipe: Any, prompt: int) -> dict[str, Any]:
    del pipe
    texts = {
        "prompt_embeds": embeddings(prompt, 7, TEXT),
        "negative_prompt_embeds": embeddings(2, 7, TEXT),
        "negative_prompt": None,
    }
    return {**texts, **square(16), "output_type": "latent"}


KINDS = [Kind("OvisImagePipeline", "Ovis-Image", make, arguments, guided={}, unguided={"guidance_scale": 1.0})]
