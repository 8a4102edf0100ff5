"""Ideogram 4's pipeline, tiny. Two transformers, and thirteen layers of a text encoder's thirty-six."""

from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline, Ideogram4Transformer2DModel
from transformers import Qwen3VLConfig, Qwen3VLModel

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import PROMPTS, build, tokenizer
from tests.support.zoo.parts_image import amplify, levels, square

TEXT = 8
TEMPLATE = "{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}"
MODEL: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "adaln_dim": 16,
    "llm_features_dim": 13 * TEXT,
    "mrope_section": (4, 2, 2),
}


LOUD = ("adaln_modulation",)


def text_encoder() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = {"hidden_size": TEXT, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    text |= {"num_hidden_layers": 36, "vocab_size": 32, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": TEXT}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 4}
    return build(Qwen3VLModel, 8, config=Qwen3VLConfig(text_config=text, vision_config=vision))


def transformers() -> dict[str, Any]:
    """Two that are alike, as those trained for a guidance scale are."""
    first, second, other = (build(Ideogram4Transformer2DModel, seed, **MODEL) for seed in (0, 0, 1))
    with torch.no_grad():
        for weight, change in zip(second.parameters(), other.parameters(), strict=True):
            weight.lerp_(change, 0.1)
    return {"transformer": amplify(first, 3, *LOUD), "unconditional_transformer": amplify(second, 3, *LOUD)}


def make() -> Any:
    return Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=build(AutoencoderKLFlux2, 9, latent_channels=4, **levels(2)),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(chat_template=TEMPLATE),  # pyright: ignore[reportArgumentType]
        **transformers(),
    )


def arguments(pipe: Any, prompt: int) -> dict[str, Any]:
    """The shift makes up for how small the picture is."""
    del pipe
    schedule = {"guidance_scale": 4.0, "guidance_schedule": None, "mu": 3.5}
    return {"prompt": PROMPTS[prompt], "max_sequence_length": 8, **schedule, **square(16), "output_type": "latent"}


KINDS = [Kind("Ideogram4Pipeline", "Ideogram 4", make, arguments, guided={})]
