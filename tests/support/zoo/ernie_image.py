"""ERNIE-Image's pipeline, tiny."""

from typing import Any

from diffusers import AutoencoderKLFlux2, ErnieImagePipeline, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, noise
from tests.support.zoo.parts_image import levels, square

TEXT = 24
MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_layers": 2,
    "ffn_hidden_size": 48,
    "in_channels": 16,
    "out_channels": 16,
    "text_in_dim": TEXT,
    "rope_axes_dim": (4, 6, 6),
}


def make() -> Any:
    return ErnieImagePipeline(
        transformer=build(ErnieImageTransformer2DModel, **MODEL),
        vae=build(AutoencoderKLFlux2, 9, latent_channels=4, **levels(2)),
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        tokenizer=None,  # pyright: ignore[reportArgumentType]
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def arguments(pipe: Any, prompt: int) -> dict[str, Any]:
    del pipe
    words = [noise(5 + which, TEXT, seed=100 + which) for which in (prompt, 2)]
    return {"prompt_embeds": words[:1], "negative_prompt_embeds": words[1:], **square(16), "output_type": "latent"}


KINDS = [Kind("ErnieImagePipeline", "ERNIE-Image", make, arguments, guided={}, unguided={"guidance_scale": 1.0})]
