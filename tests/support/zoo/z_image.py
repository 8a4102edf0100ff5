"""Z-Image's pipelines, tiny."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageControlNetModel, ZImageTransformer2DModel
from transformers import Siglip2ImageProcessor, Siglip2VisionConfig, Siglip2VisionModel

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, noise, picture
from tests.support.zoo.parts_image import autoencoder, mask

TEXT = 24
VISION = 16
SIZE = 64
SQUARE: dict[str, Any] = {"height": SIZE, "width": SIZE}
MODEL: dict[str, Any] = {
    "in_channels": 16,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": TEXT,
    "axes_dims": [4, 6, 6],
    "axes_lens": [128, 64, 64],
}
CONTROL = {key: MODEL[key] for key in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")}
CONTROL |= {"control_layers_places": [0], "control_refiner_layers_places": [0]}


def controlnet(channels: int, refiner: str | None = None) -> Any:
    return build(ZImageControlNetModel, 1, control_in_dim=channels, add_control_noise_refiner=refiner, **CONTROL)


def eyes() -> dict[str, Any]:
    """What looks at pictures that are to be edited."""
    size: dict[str, Any] = {"hidden_size": VISION, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Siglip2VisionConfig(patch_size=16, num_patches=16, **size)
    processor = Siglip2ImageProcessor(patch_size=16, max_num_patches=16)
    return {"siglip": build(Siglip2VisionModel, 8, config=config), "siglip_processor": processor}


def make(name: str, *, shift: float = 6.0, parts: Callable[[], dict[str, Any]] = dict, **changes: Any) -> Any:
    vae = autoencoder(16, 4, scaling_factor=0.36, shift_factor=0.12)
    given = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=shift), "vae": vae, "text_encoder": None, "tokenizer": None}
    transformer = build(ZImageTransformer2DModel, **{**MODEL, **changes})
    return getattr(diffusers, name)(transformer=transformer, **{**given, **parts()})


def omni() -> Any:
    """It encodes pictures in half precision, whatever the rest's is."""
    pipe = make("ZImageOmniPipeline", parts=eyes, siglip_feat_dim=VISION)
    pipe.vae.to(torch.bfloat16)
    return pipe


def words(prompt: int, tokens: int = 7) -> torch.Tensor:
    return noise(tokens, TEXT, seed=100 + prompt)


def kind(
    name: str, given: Callable[[], dict[str, Any]] = dict, variant: str = "", *, turbo: bool = False, **options: Any
) -> Kind:
    def arguments(pipe: Any, prompt: int) -> dict[str, Any]:
        del pipe
        negative = {"guidance_scale": 0.0} if turbo else {"negative_prompt_embeds": [words(2, 5)]}
        return {"prompt_embeds": [words(prompt, 7 + prompt)], **negative, "output_type": "latent", **SQUARE, **given()}

    return Kind(
        f"{name}{variant}",
        "Z-Image",
        lambda: make(name, shift=3.0 if turbo else 6.0, **options),
        arguments,
        guided=None if turbo else {},
        unguided={} if turbo else {"guidance_scale": 0.0},
    )


def two(pipe: Any, prompt: int) -> dict[str, Any]:
    """Of different lengths."""
    del pipe
    texts = {"prompt_embeds": [words(prompt), words(3 + prompt, 40)], "negative_prompt_embeds": [words(2, 5)] * 2}
    return {**texts, "output_type": "latent", **SQUARE}


def condition() -> dict[str, Any]:
    return {"control_image": picture(SIZE, SIZE, 1)}


def looked_at(count: int) -> Callable[[Any, int], dict[str, Any]]:
    """A prompt's words lie before, between and behind pictures."""

    def arguments(pipe: Any, prompt: int) -> dict[str, Any]:
        del pipe
        pieces = [[words(10 * which + piece, 5 + piece) for piece in range(count + 2 if count else 1)] for which in (prompt, 2)]
        images = {"image": [picture(SIZE, SIZE, seed) for seed in range(count)]} if count else SQUARE
        return {"prompt_embeds": pieces[:1], "negative_prompt_embeds": pieces[1:], "output_type": "latent", **images}

    return arguments


GUIDANCE: dict[str, Any] = {"guided": {}, "unguided": {"guidance_scale": 0.0}}
PART: dict[str, Any] = {"image": picture(SIZE, SIZE), "mask_image": mask(SIZE)}

KINDS = [
    kind("ZImagePipeline"),
    kind("ZImagePipeline", lambda: {"cfg_normalization": True, "cfg_truncation": 0.4}, " [truncated guidance]"),
    kind("ZImagePipeline", variant=" [Turbo]", turbo=True),
    kind("ZImagePipeline", variant=" [two prompts]")._replace(arguments=two),
    kind("ZImageImg2ImgPipeline", lambda: {"image": picture(SIZE, SIZE), "strength": 0.7}),
    kind("ZImageInpaintPipeline", lambda: {**PART, "strength": 0.7}),
    kind("ZImageControlNetPipeline", condition, turbo=True, parts=lambda: {"controlnet": controlnet(16)}),
    kind(
        "ZImageControlNetPipeline",
        condition,
        " [2.1, guided]",
        parts=lambda: {"controlnet": controlnet(33, "control_noise_refiner")},
    ),
    kind(
        "ZImageControlNetInpaintPipeline",
        lambda: {**PART, **condition()},
        turbo=True,
        parts=lambda: {"controlnet": controlnet(33, "control_layers")},
    ),
    Kind("ZImageOmniPipeline", "Z-Image", omni, looked_at(0), **GUIDANCE),
    Kind("ZImageOmniPipeline [two images]", "Z-Image", omni, looked_at(2), **GUIDANCE),
]
