"""What only image pipelines need: embeddings of prompts, masks, autoencoders, a scheduler that several families share."""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.support.zoo.parts import build, noise


def pooled(prompt: int, width: int) -> torch.Tensor:
    """What is summed up of a prompt."""
    return noise(1, width, seed=200 + prompt)


def mask(size: int) -> Image.Image:
    """The right half is to be drawn."""
    return Image.fromarray(np.repeat(np.arange(size)[None] >= size // 2, size, axis=0).astype(np.uint8) * 255)


def flux_scheduler(**changes: Any) -> FlowMatchEulerDiscreteScheduler:
    """As FLUX.1-dev's, whose shift grows with the image; many families took it over."""
    shifting = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, "use_dynamic_shifting": True, **shifting, **changes})


class Remembering:
    """An autoencoder that encodes a picture once: at a million pixels that takes longer than all of a tiny model's steps."""

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        known: list[tuple[torch.Tensor, torch.Tensor]] = self.__dict__.setdefault("_encoded", [])
        for given, encoded in known:
            if given.dtype == x.dtype and torch.equal(given, x):
                return encoded.clone()
        encoded = super()._encode(x)  # pyright: ignore[reportAttributeAccessIssue]
        known.append((x.clone(), encoded.clone()))
        return encoded


class Certain:
    """An autoencoder without doubt: some pipelines sample what they encode, and from the global generator."""

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        encoded = super().encode(x)  # pyright: ignore[reportAttributeAccessIssue]
        encoded.latent_dist.std = torch.zeros_like(encoded.latent_dist.std)
        return encoded if return_dict else (encoded.latent_dist,)


class CertainKL(Certain, AutoencoderKL):
    """Of Stable Diffusion's sort."""


def levels(count: int) -> dict[str, Any]:
    """The sizes of a picture's autoencoder, of as many levels: each but the first halves the picture."""
    return {
        "down_block_types": ("DownEncoderBlock2D",) * count,
        "up_block_types": ("UpDecoderBlock2D",) * count,
        "block_out_channels": (4,) * count,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "mid_block_add_attention": False,
    }


def autoencoder(channels: int = 4, count: int = 2, model: type[AutoencoderKL] = AutoencoderKL, **changes: Any) -> Any:
    """Of Stable Diffusion's sort."""
    return build(model, 9, **{**levels(count), "latent_channels": channels, **changes})


@torch.no_grad()
def amplify(model: Any, factor: float, *endings: str) -> Any:
    """The model, with the weights multiplied of every layer whose name ends so: what a prompt says would hardly matter else."""
    for name, layer in model.named_modules():
        if name.endswith(endings):
            layer.weight.mul_(factor)
    return model


def square(size: int) -> dict[str, Any]:
    """How large a picture is to be."""
    return {"height": size, "width": size}


def words_and_pictures(width: int, vocabulary: int = 64) -> Any:
    """Qwen2.5-VL, which several families encode their prompts with."""
    size = {"hidden_size": width, "intermediate_size": 16, "num_attention_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, width // 4 - 2]}
    text = {**size, "vocab_size": vocabulary, "num_hidden_layers": 1, "num_key_value_heads": 1, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    return build(Qwen2_5_VLForConditionalGeneration, 8, config=Qwen2_5_VLConfig(text_config=text, vision_config=vision))


@torch.no_grad()
def echo(model: Any, last: torch.nn.Linear) -> Any:
    """The model, so that it answers about what it is given, as one must that predicts the noise of what is nearly noise."""
    embed = model.pos_embed.proj.weight
    columns = torch.linalg.qr(embed.flatten(1))[0]
    embed.copy_(columns.reshape(embed.shape))
    last.weight.mul_(0.1)
    rows = last.weight.unflatten(0, (*embed.shape[2:], -1))
    rows[..., : embed.shape[1], :] += 0.7 * embed.permute(2, 3, 1, 0)
    return model
