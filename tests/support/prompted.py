"""Tiny pipelines that draw from a prompt: some of the zoo's, with text encoders and tokenizers of the real classes."""

from collections.abc import Callable
from typing import Any

from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from tests.support.zoo import flux2, ltx, ltx2, qwen_image, sd3
from tests.support.zoo.parts import build, tokenizer
from tests.support.zoo.parts_image import words_and_pictures
from tests.support.zoo.parts_video import of_config

_CHAT = "{% for message in messages %}{{ message.content }} {% endfor %}"
_WORDS = 64


def _with(pipe: Any, **parts: Any) -> Any:
    """The pipeline with these parts in place of none."""
    pipe.register_modules(**parts)
    return pipe


def _t5(width: int) -> T5EncoderModel:
    size = {"d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return build(of_config(T5EncoderModel, T5Config), 6, vocab_size=_WORDS, **size)


def _clip(width: int, projection: int) -> CLIPTextModelWithProjection:
    size = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "projection_dim": projection}
    return build(of_config(CLIPTextModelWithProjection, CLIPTextConfig), 7, vocab_size=_WORDS, **size, **ends)


def _decoder(model: Any, config: Any, width: int, layers: int) -> Any:
    size = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": layers, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return build(of_config(model, config), 5, vocab_size=_WORDS, **size, **heads)


def _qwen_image() -> Any:
    pipe = qwen_image.make("QwenImagePipeline")
    return _with(pipe, text_encoder=words_and_pictures(qwen_image.TEXT), tokenizer=tokenizer())


def _flux2_klein() -> Any:
    """Its prompts are what three layers of 28 make of them."""
    words = tokenizer()
    words.chat_template = _CHAT
    return _with(
        flux2.make("Flux2KleinPipeline"),
        text_encoder=_decoder(Qwen3ForCausalLM, Qwen3Config, flux2.TEXT // 3, 28),
        tokenizer=words,
    )


def _stable_diffusion_3() -> Any:
    """T5 is left out, as it may be."""
    half, words = sd3.POOLED // 2, tokenizer(model_max_length=77)
    encoders = {"text_encoder": _clip(8, half), "text_encoder_2": _clip(8, sd3.POOLED - half)}
    return _with(sd3.make("StableDiffusion3Pipeline"), **encoders, tokenizer=words, tokenizer_2=words)


def _ltx() -> Any:
    return _with(ltx.make(), text_encoder=_t5(ltx.TEXT), tokenizer=tokenizer())


def _ltx2() -> Any:
    """Its prompts are what all layers make of them."""
    encoder = _decoder(Gemma3ForCausalLM, Gemma3TextConfig, ltx2.TEXT, 1)
    return _with(ltx2.make_text(), text_encoder=encoder, tokenizer=tokenizer())


# By the name of the class.
PROMPTED: dict[str, Callable[[], Any]] = {
    "QwenImagePipeline": _qwen_image,
    "Flux2KleinPipeline": _flux2_klein,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "LTXPipeline": _ltx,
    "LTX2Pipeline": _ltx2,
}
# How large they can draw.
SIZES: dict[str, tuple[str, ...]] = {
    "QwenImagePipeline": ("--height", "512", "--width", "512"),
    "Flux2KleinPipeline": ("--height", "64", "--width", "64"),
    "StableDiffusion3Pipeline": ("--height", str(sd3.SIZE), "--width", str(sd3.SIZE)),
    "LTXPipeline": ("--height", "64", "--width", "128", "--num-frames", "17"),
    "LTX2Pipeline": ("--height", "64", "--width", "128", "--num-frames", "17"),
}
