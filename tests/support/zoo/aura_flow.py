"""AuraFlow's pipeline, tiny."""

from typing import Any

from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, ones
from tests.support.zoo.parts_image import amplify, autoencoder, square

TEXT = 24
MODEL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_mmdit_layers": 2,
    "num_single_dit_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "caption_projection_dim": 32,
    "pos_embed_max_size": 16,
}


LOUD = ("attn.add_v_proj", "attn.to_v", "attn.to_out.0", "norm1.linear", "norm1_context.linear")


def make() -> Any:
    return AuraFlowPipeline(
        tokenizer=None,  # pyright: ignore[reportArgumentType]
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        vae=autoencoder(4, scaling_factor=0.13),
        transformer=amplify(build(AuraFlowTransformer2DModel, **MODEL), 3, *LOUD),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def arguments(pipe: Any, prompt: int) -> dict[str, Any]:
    del pipe
    texts = {"prompt_embeds": embeddings(prompt, 7, TEXT), "prompt_attention_mask": ones(1, 7)}
    negative = {"negative_prompt_embeds": embeddings(2, 7, TEXT), "negative_prompt_attention_mask": ones(1, 7)}
    return {**texts, **negative, **square(16), "output_type": "latent"}


KINDS = [Kind("AuraFlowPipeline", "AuraFlow", make, arguments, guided={}, unguided={"guidance_scale": 1.0})]
