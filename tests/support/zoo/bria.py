"""Bria's pipelines, tiny."""

import json
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLWan,
    BriaFibo2Transformer2DModel,
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
)
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import PROMPTS, build, embeddings, noise, ones, picture, tokenizer
from tests.support.zoo.parts_image import amplify, autoencoder, flux_scheduler, levels, square

TEXT = 16
FIBO_SIZE = 64
BLOCKS: dict[str, Any] = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
FIBO2: dict[str, Any] = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "cap_feat_dim": TEXT,
    "injection_layer_ids": (1,),
    "perceiver_num_layers": 1,
    "min_num_gist_tokens": 4,
    "max_num_gist_tokens": 8,
    "gist_step": 2,
    "gist_min_text_len": 4,
    "gist_max_text_len": 16,
    "axes_dims": (4, 6, 6),
    "axes_lens": (64, 32, 32),
}
VAE: dict[str, Any] = {"base_dim": 2, "z_dim": 4, "num_res_blocks": 1, "dim_mult": [1] * 5, "temperal_downsample": [False] * 4}
GUIDANCE: dict[str, Any] = {"guided": {}, "unguided": {"guidance_scale": 1.0}}


def bria() -> Any:
    config = {"in_channels": 16, "joint_attention_dim": TEXT, "axes_dims_rope": [4, 6, 6], **BLOCKS}
    return diffusers.BriaPipeline(
        transformer=amplify(build(BriaTransformer2DModel, **config), 3, "attn.add_v_proj"),
        scheduler=flux_scheduler(),
        vae=autoencoder(4, shift_factor=0.0, scaling_factor=0.13),
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        tokenizer=None,  # pyright: ignore[reportArgumentType]
    )


def bria_arguments(pipe: Any, prompt: int) -> dict[str, Any]:
    del pipe
    texts = {"prompt_embeds": embeddings(prompt, 7, TEXT), "negative_prompt_embeds": embeddings(2, 7, TEXT)}
    return {**texts, **square(16), "output_type": "latent"}


def fibo(name: str) -> Any:
    """Every block is given another layer of its text encoder."""
    config = {
        "in_channels": 4,
        "joint_attention_dim": 2 * TEXT,
        "text_encoder_dim": TEXT,
        "axes_dims_rope": [4, 6, 6],
        **BLOCKS,
    }
    size = {"hidden_size": TEXT, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 64}
    special: dict[str, Any] = {"num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return getattr(diffusers, name)(
        transformer=amplify(build(BriaFiboTransformer2DModel, **config), 3, "attn.add_v_proj"),
        scheduler=flux_scheduler(),
        vae=build(AutoencoderKLWan, 9, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 0.6, 0.7, 0.8], **VAE),
        text_encoder=build(SmolLM3ForCausalLM, 8, config=SmolLM3Config(**size, **special)),
        tokenizer=tokenizer(),
    )


def fibo_arguments(pipe: Any, prompt: int) -> dict[str, Any]:
    del pipe
    return {"prompt": PROMPTS[prompt], "negative_prompt": "an owl", **square(FIBO_SIZE), "output_type": "latent"}


def fibo_edit(pipe: Any, prompt: int) -> dict[str, Any]:
    told = json.dumps({"edit_instruction": PROMPTS[prompt]})
    return {**fibo_arguments(pipe, prompt), "prompt": told, "image": picture(FIBO_SIZE, FIBO_SIZE)}


def fibo2() -> Any:
    return diffusers.BriaFibo2Pipeline(
        transformer=build(BriaFibo2Transformer2DModel, **FIBO2),
        scheduler=flux_scheduler(),
        vae=build(AutoencoderKLFlux2, 9, latent_channels=4, **levels(2)),
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        processor=None,  # pyright: ignore[reportArgumentType]
    )


def bundle(prompt: int) -> torch.Tensor:
    """A prompt's layers."""
    return noise(1, 2, 7, TEXT, seed=100 + prompt)


def fibo2_arguments(pipe: Any, prompt: int) -> dict[str, Any]:
    del pipe
    texts = {"prompt_embeds": bundle(prompt), "prompt_embeds_mask": ones(1, 7)}
    negative = {"negative_prompt_embeds": bundle(2), "negative_prompt_embeds_mask": ones(1, 7)}
    return {**texts, **negative, **square(16), "output_type": "latent"}


def fibo2_edit(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**fibo2_arguments(pipe, prompt), "image": picture(64, 64)}


KINDS = [
    Kind("BriaPipeline", "Bria", bria, bria_arguments, **GUIDANCE),
    Kind("BriaFiboPipeline", "Bria Fibo", lambda: fibo("BriaFiboPipeline"), fibo_arguments, **GUIDANCE),
    Kind("BriaFiboEditPipeline", "Bria Fibo", lambda: fibo("BriaFiboEditPipeline"), fibo_edit, **GUIDANCE),
    Kind("BriaFibo2Pipeline", "Bria Fibo 2", fibo2, fibo2_arguments, **GUIDANCE),
    Kind("BriaFibo2Pipeline [edit]", "Bria Fibo 2", fibo2, fibo2_edit, **GUIDANCE),
]
