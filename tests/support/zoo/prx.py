"""PRX's pipeline, tiny; the one that draws pixels predicts the clean image, which is not forecast."""

from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler, PRXTransformer2DModel

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, ones
from tests.support.zoo.parts_image import autoencoder, square

TEXT, TOKENS, SIZE = 24, 7, 16
MODEL: dict[str, Any] = {
    "context_in_dim": TEXT,
    "hidden_size": 32,
    "num_heads": 2,
    "depth": 2,
    "axes_dim": [8, 8],
}


def make(name: str, channels: int, **parts: Any) -> Any:
    return getattr(diffusers, name)(
        transformer=build(PRXTransformer2DModel, in_channels=channels, **MODEL),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=None,
        tokenizer=None,
        **parts,
    )


def arguments(pipe: Any, prompt: int) -> dict[str, Any]:
    del pipe
    mine = {"prompt_embeds": embeddings(prompt, TOKENS, TEXT), "prompt_attention_mask": ones(1, TOKENS).bool()}
    return {**mine, **square(SIZE), "use_resolution_binning": False, "output_type": "latent"}


GUIDED = {
    "guidance_scale": 4.0,
    "negative_prompt_embeds": embeddings(2, TOKENS, TEXT),
    "negative_prompt_attention_mask": ones(1, TOKENS).bool(),
}

KINDS = [
    Kind(
        "PRXPipeline",
        "PRX",
        lambda: make("PRXPipeline", 4, vae=autoencoder()),
        arguments,
        guided=GUIDED,
        unguided={"guidance_scale": 1.0},
    ),
    Kind(
        "PRXPixelPipeline",
        "PRX",
        lambda: make("PRXPixelPipeline", 3),
        lambda pipe, prompt: {**arguments(pipe, prompt), "output_type": "pt"},
        guided=GUIDED,
        unguided={"guidance_scale": 1.0},
    ),
]
