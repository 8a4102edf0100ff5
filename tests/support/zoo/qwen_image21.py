"""Qwen-Image 2.1's pipeline, tiny. Words and what is edited are computed in the first step, and remembered."""

from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline, QwenImage21Transformer2DModel
from transformers import BatchFeature, Qwen2VLImageProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import PROMPTS, build, embeddings, ones, picture, tokenizer
from tests.support.zoo.parts_image import amplify, flux_scheduler, square

TEXT = 24
SIZE = 64
PAD = "<|image_pad|>"
SPECIAL = ("<|vision_start|>", PAD, "<|vision_end|>")
MODEL: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "context_in_dim": TEXT,
    "axes_dims_rope": (4, 6, 6),
}
VAE: dict[str, Any] = {
    "base_dim": 4,
    "decoder_base_dim": 4,
    "z_dim": 8,
    "dim_mult": [1] * 5,
    "num_res_blocks": 1,
    "latents_mean": [0.1] * 8,
    "latents_std": [0.6] * 8,
    "scale_factor_spatial": 16,
}


class Processor:
    """Qwen's for words and pictures needs torchvision."""

    def __init__(self) -> None:
        self.tokenizer = tokenizer(*SPECIAL)
        self.image_processor = Qwen2VLImageProcessor(patch_size=16, min_pixels=SIZE**2, max_pixels=SIZE**2)

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> list[list[int]]:
        del options
        return [self.tokenizer.encode(messages[0]["content"][0]["text"])]

    def __call__(self, text: list[str], images: list[Any], **options: Any) -> BatchFeature:
        del options
        seen = self.image_processor(images=images, return_tensors="pt")
        for grid in seen["image_grid_thw"]:
            text = [words.replace(PAD, "<|placeholder|>" * (int(grid.prod()) // 4), 1) for words in text]
        words = self.tokenizer([each.replace("<|placeholder|>", f" {PAD} ") for each in text], return_tensors="pt")
        kinds = (words["input_ids"] == self.tokenizer.convert_tokens_to_ids(PAD)).int()
        return BatchFeature({**words, **seen, "mm_token_type_ids": kinds})


def text_encoder(words: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = {"hidden_size": TEXT, "intermediate_size": 16, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}
    text |= {"num_hidden_layers": 1, "vocab_size": 64, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    names = ("vision_start_token_id", "image_token_id", "vision_end_token_id")
    tokens = dict(zip(names, words.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
    return build(Qwen3VLForConditionalGeneration, 8, config=config)


def make() -> Any:
    processor = Processor()
    return QwenImage21Pipeline(
        scheduler=flux_scheduler(),
        vae=build(AutoencoderKLQwenImage21, 9, **VAE),
        text_encoder=text_encoder(processor.tokenizer),
        processor=processor,  # pyright: ignore[reportArgumentType]
        transformer=amplify(build(QwenImage21Transformer2DModel, **MODEL), 3, "attn.to_out.0", "attn.to_v"),
    )


def arguments(pipe: Any, prompt: int) -> dict[str, Any]:
    del pipe
    texts = {"prompt_embeds": embeddings(prompt, 7, TEXT), "prompt_embeds_mask": ones(1, 7)}
    return {**texts, **square(SIZE), "output_type": "latent"}


def uncached(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**arguments(pipe, prompt), "use_kv_cache": False}


def edit(pipe: Any, prompt: int) -> dict[str, Any]:
    """It cannot be given embeddings together with a picture."""
    del pipe
    given = {"prompt": PROMPTS[prompt], "image": picture(SIZE, SIZE)}
    return {**given, "output_resolution": SIZE, **square(SIZE), "output_type": "latent"}


FAMILY = "Qwen-Image 2.1"
NEGATIVE: dict[str, torch.Tensor] = {
    "negative_prompt_embeds": embeddings(2, 7, TEXT),
    "negative_prompt_embeds_mask": ones(1, 7),
}
GUIDANCE: dict[str, Any] = {"guided": {"true_cfg_scale": 4.0, **NEGATIVE}, "unguided": {}}
WITH_WORDS: dict[str, Any] = {"guided": {"true_cfg_scale": 4.0, "negative_prompt": "an owl"}, "unguided": {}}

KINDS = [
    Kind("QwenImage21Pipeline", FAMILY, make, arguments, **GUIDANCE),
    Kind("QwenImage21Pipeline [no key-value cache]", FAMILY, make, uncached, **GUIDANCE),
    Kind("QwenImage21Pipeline [edit]", FAMILY, make, edit, **WITH_WORDS),
]
