"""FLUX.2's pipelines, tiny."""

from typing import Any

import diffusers
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, picture
from tests.support.zoo.parts_image import amplify, flux_scheduler, levels, mask

TEXT = 24
SIZE = 64
SQUARE: dict[str, Any] = {"height": SIZE, "width": SIZE}
MODEL: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
}
LOUD = ("attn.to_out.0", "attn.add_v_proj")


def make(name: str, *, guidance_embeds: bool = False, **options: Any) -> Any:
    transformer = build(Flux2Transformer2DModel, guidance_embeds=guidance_embeds, **MODEL)
    return getattr(diffusers, name)(
        scheduler=flux_scheduler(),
        vae=build(AutoencoderKLFlux2, 9, latent_channels=4, **levels(4)),
        text_encoder=None,
        tokenizer=None,
        transformer=amplify(transformer, 4, *LOUD),
        **options,
    )


def arguments(prompt: int) -> dict[str, Any]:
    return {"prompt_embeds": embeddings(prompt, 7, TEXT), "output_type": "latent"}


def dev(variant: str, **given: Any) -> Kind:
    """It takes its guidance scale as an input."""
    return Kind(
        f"Flux2Pipeline{variant}",
        "FLUX.2-dev",
        lambda: make("Flux2Pipeline", guidance_embeds=True),
        lambda pipe, prompt: {**arguments(prompt), **SQUARE, **given},
    )


def klein(variant: str, name: str = "Flux2KleinPipeline", *, is_distilled: bool = False, **given: Any) -> Kind:
    """Base models are guided, with an empty negative prompt; distilled ones are not."""
    guided = {"guidance_scale": 4.0, "negative_prompt_embeds": embeddings(2, 5, TEXT)}
    return Kind(
        f"{name}{variant}",
        "FLUX.2-klein",
        lambda: make(name, is_distilled=is_distilled),
        lambda pipe, prompt: {**arguments(prompt), **({} if is_distilled else {"guidance_scale": 1.0}), **given},
        guided=None if is_distilled else guided,
        unguided=None if is_distilled else {"guidance_scale": 1.0},
    )


PART: dict[str, Any] = {"image": picture(SIZE, SIZE), "mask_image": mask(SIZE), "strength": 0.7}

KINDS = [
    dev(""),
    dev(" [edit]", image=picture(SIZE, SIZE)),
    dev(" [edit, two images]", image=[picture(SIZE, SIZE), picture(SIZE, SIZE * 3 // 2, 1)]),
    klein("", **SQUARE),
    klein(" [distilled]", is_distilled=True, **SQUARE),
    klein(" [edit]", image=picture(SIZE, SIZE), **SQUARE),
    klein("", "Flux2KleinInpaintPipeline", **PART),
    klein(" [reference]", "Flux2KleinInpaintPipeline", **PART, image_reference=picture(SIZE, SIZE, 1)),
    klein("", "Flux2KleinKVPipeline", is_distilled=True, **SQUARE),
    klein(" [edit]", "Flux2KleinKVPipeline", is_distilled=True, image=picture(SIZE, SIZE), **SQUARE),
]
