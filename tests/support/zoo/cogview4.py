"""CogView4's pipelines, tiny."""

from typing import Any

from diffusers import CogView4ControlPipeline, CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, picture
from tests.support.zoo.parts_image import CertainKL, autoencoder, square

TEXT = 24
SIZE = 16
MODEL: dict[str, Any] = {
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "text_embed_dim": TEXT,
    "time_embed_dim": 32,
    "condition_dim": 8,
    "sample_size": 8,
}


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """As CogView4's."""
    shifting: dict[str, Any] = {"base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"}
    return FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True, **shifting)


def make(pipeline: Any, channels: int) -> Any:
    return pipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder(4, model=CertainKL, scaling_factor=1.0, shift_factor=0.0),
        transformer=build(CogView4Transformer2DModel, in_channels=channels, **MODEL),
        scheduler=scheduler(),
    )


def kind(pipeline: Any, channels: int, given: dict[str, Any]) -> Kind:
    def arguments(pipe: Any, prompt: int) -> dict[str, Any]:
        del pipe
        texts = {"prompt_embeds": embeddings(prompt, 16, TEXT), "negative_prompt_embeds": embeddings(2, 16, TEXT)}
        return {**texts, **square(SIZE), **given, "output_type": "latent"}

    guidance: dict[str, Any] = {"guided": {}, "unguided": {"guidance_scale": 1.0}}
    return Kind(pipeline.__name__, "CogView4", lambda: make(pipeline, channels), arguments, **guidance)


KINDS = [
    kind(CogView4Pipeline, 4, {}),
    kind(CogView4ControlPipeline, 8, {"control_image": picture(SIZE, SIZE)}),
]
