"""Qwen-Image 2.1's pipeline, tiny. It is not told to edit here: that needs a processor of words and pictures."""

from typing import Any

from diffusers import QwenImage21Pipeline, QwenImage21Transformer2DModel

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, ones, tokenizer
from tests.support.zoo.parts_image import amplify, embeddings, flux_scheduler, square

TEXT = 24
MODEL: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "context_in_dim": TEXT,
    "axes_dims_rope": (4, 6, 6),
}


class Processor:
    """The part of Qwen's that counts the words of a system prompt; the whole one needs torchvision."""

    def __init__(self) -> None:
        self.tokenizer = tokenizer("<|image_pad|>")

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> list[list[int]]:
        del options
        return [self.tokenizer.encode(messages[0]["content"][0]["text"])]


def make() -> Any:
    return QwenImage21Pipeline(
        scheduler=flux_scheduler(),
        vae=None,  # pyright: ignore[reportArgumentType]
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        processor=Processor(),  # pyright: ignore[reportArgumentType]
        transformer=amplify(build(QwenImage21Transformer2DModel, **MODEL), 3, "attn.to_out.0", "attn.to_v"),
    )


def arguments(pipe: Any, prompt: int) -> dict[str, Any]:
    del pipe
    texts = {"prompt_embeds": embeddings(prompt, 7, TEXT), "prompt_embeds_mask": ones(1, 7)}
    return {**texts, **square(64), "output_type": "latent"}


def uncached(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**arguments(pipe, prompt), "use_kv_cache": False}


NEGATIVE = {"negative_prompt_embeds": embeddings(2, 7, TEXT), "negative_prompt_embeds_mask": ones(1, 7)}
GUIDANCE: dict[str, Any] = {"guided": {"true_cfg_scale": 4.0, **NEGATIVE}, "unguided": {}}

KINDS = [
    Kind("QwenImage21Pipeline", "Qwen-Image 2.1", make, arguments, **GUIDANCE),
    Kind("QwenImage21Pipeline [no key-value cache]", "Qwen-Image 2.1", make, uncached, **GUIDANCE),
]
