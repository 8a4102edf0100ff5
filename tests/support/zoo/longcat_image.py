"""LongCat-Image's pipelines, tiny. They cannot be given embeddings instead of a prompt, so they have a text encoder."""

from typing import Any

from diffusers import LongCatImageEditPipeline, LongCatImagePipeline, LongCatImageTransformer2DModel
from transformers import Qwen2VLImageProcessor

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import PROMPTS, build, picture, tokenizer
from tests.support.zoo.parts_image import amplify, autoencoder, flux_scheduler, square, words_and_pictures

TEXT = 16
VISION = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
MODEL: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": TEXT,
    "axes_dims_rope": [4, 6, 6],
}


class Processor:
    """The part of Qwen's that looks at pictures; the whole one needs torchvision."""

    def __init__(self) -> None:
        self.image_processor = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=56 * 56)


def make(pipeline: Any, levels: int) -> Any:
    words = tokenizer(*VISION)
    encoder = words_and_pictures(TEXT)
    encoder.config.image_token_id = words.convert_tokens_to_ids("<|image_pad|>")
    encoder.config.vision_start_token_id = words.convert_tokens_to_ids("<|vision_start|>")
    pipe = pipeline(
        scheduler=flux_scheduler(),
        vae=autoencoder(16, levels, shift_factor=0.12, scaling_factor=0.36),
        text_encoder=encoder,
        tokenizer=words,
        text_processor=Processor(),
        transformer=amplify(build(LongCatImageTransformer2DModel, **MODEL), 3, "attn.add_v_proj"),
    )
    pipe.tokenizer_max_length = 8
    return pipe


def text_to_image(pipe: Any, prompt: int) -> dict[str, Any]:
    del pipe
    return {"prompt": PROMPTS[prompt], "enable_prompt_rewrite": False, "output_type": "latent", **square(16)}


def edit(pipe: Any, prompt: int) -> dict[str, Any]:
    del pipe
    return {"prompt": PROMPTS[prompt], "image": picture(64, 64), "output_type": "latent"}


GUIDANCE: dict[str, Any] = {"guided": {}, "unguided": {"guidance_scale": 1.0}}

KINDS = [
    Kind("LongCatImagePipeline", "LongCat-Image", lambda: make(LongCatImagePipeline, 2), text_to_image, **GUIDANCE),
    Kind("LongCatImageEditPipeline", "LongCat-Image", lambda: make(LongCatImageEditPipeline, 8), edit, **GUIDANCE),
]
