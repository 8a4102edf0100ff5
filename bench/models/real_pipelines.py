"""Pipelines that people run, at their real sizes and with random weights; and small ones that the tests draw with."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

from bench.models import random_flux, random_qwen_image, random_wan
from bench.models.random_flux import default_dtype

DTYPE = torch.bfloat16


class RealPipeline(NamedTuple):
    """A pipeline of random weights, called as users call it.

    Attributes:
        title: its name, and what is drawn.
        transformer: class's name.
        settings: where the model differs from its class's defaults.
        small: further changes, for a model that tests can run.
        blocks: attribute that holds the blocks which run last.
        make_pipeline: `(transformer) -> pipeline`, without text encoder and autoencoder.
        arguments: `(transformer's config, noise) -> arguments` of the pipeline, for one prompt; `noise(*sizes)` is random.
        size: of the picture or clip.
        small_size: of what the tests draw.
        tokens: of the text.

    """

    title: str
    transformer: str
    settings: Mapping[str, Any]
    small: Mapping[str, Any]
    blocks: str
    make_pipeline: Callable[[Any], Any]
    arguments: Callable[[Any, Callable[..., Tensor]], dict[str, Any]]
    size: Mapping[str, int]
    small_size: Mapping[str, int]
    tokens: int = 512

    def make(self, *, device: torch.device | str, is_small: bool = False) -> Any:
        """The pipeline on a device, where its weights are made in their own precision."""
        torch.manual_seed(0)
        settings = {**self.settings, **(self.small if is_small else {})}
        with torch.device(device), default_dtype(DTYPE):
            transformer = getattr(diffusers, self.transformer)(**settings).eval()
        pipe = self.make_pipeline(transformer).to(device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe: Any, *, steps: int, is_small: bool = False) -> Tensor:
        """Latents, always the same."""
        generator = torch.Generator().manual_seed(0)

        def noise(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(pipe.device, DTYPE)

        given = self.arguments(pipe.transformer.config, noise)
        given |= self.small_size if is_small else self.size
        return pipe(**given, num_inference_steps=steps, generator=generator, output_type="latent")[0]


def _flux1(config: Any, noise: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 512, config.joint_attention_dim),
        "pooled_prompt_embeds": noise(1, config.pooled_projection_dim),
    }


def _flux2(config: Any, noise: Callable[..., Tensor]) -> dict[str, Any]:
    return {"prompt_embeds": noise(1, 512, config.joint_attention_dim)}


def _flux2_pipeline(transformer: Any) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    return diffusers.Flux2Pipeline(scheduler=scheduler, transformer=transformer, **parts)


def _qwen_image(config: Any, noise: Callable[..., Tensor]) -> dict[str, Any]:
    prompt, negative = (noise(1, 512, config.joint_attention_dim) for _ in range(2))
    mask = torch.ones(1, 512, dtype=torch.int64, device=prompt.device)
    masks = {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask}
    return {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "true_cfg_scale": random_qwen_image.GUIDANCE, **masks}


def _wan(config: Any, noise: Callable[..., Tensor]) -> dict[str, Any]:
    prompt, negative = (noise(1, 512, config.text_dim) for _ in range(2))
    return {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "guidance_scale": random_wan.GUIDANCE}


def _z_image(config: Any, noise: Callable[..., Tensor]) -> dict[str, Any]:
    prompt, negative = (noise(512, config.cap_feat_dim) for _ in range(2))
    return {"prompt_embeds": [prompt], "negative_prompt_embeds": [negative], "guidance_scale": 5.0}


def _z_image_pipeline(transformer: Any) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    parts: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    return diffusers.ZImagePipeline(scheduler=scheduler, transformer=transformer, **parts)


_SQUARE, _SMALL_SQUARE = {"height": 1024, "width": 1024}, {"height": 64, "width": 64}
_SMALL = {"num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2}

REAL_PIPELINES = {
    "flux1": RealPipeline(
        "FLUX.1-dev, 1024 x 1024",
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        {**_SMALL, "num_single_layers": 2, "axes_dims_rope": (4, 14, 14), "joint_attention_dim": 32},
        "single_transformer_blocks",
        random_flux.make_pipeline,
        _flux1,
        _SQUARE,
        _SMALL_SQUARE,
    ),
    "flux2": RealPipeline(
        "FLUX.2-dev, 1024 x 1024",
        "Flux2Transformer2DModel",
        {},
        {**_SMALL, "num_single_layers": 2, "axes_dims_rope": (8, 8, 8, 8), "joint_attention_dim": 32},
        "single_transformer_blocks",
        _flux2_pipeline,
        _flux2,
        _SQUARE,
        _SMALL_SQUARE,
    ),
    "qwen_image": RealPipeline(
        "Qwen-Image, 1024 x 1024, guided by a call of its own",
        "QwenImageTransformer2DModel",
        {},
        {**_SMALL, "axes_dims_rope": (4, 14, 14), "joint_attention_dim": 32},
        "transformer_blocks",
        random_qwen_image.make_pipeline,
        _qwen_image,
        _SQUARE,
        _SMALL_SQUARE,
    ),
    "wan21_1_3b": RealPipeline(
        "Wan 2.1 1.3B, 832 x 480, 81 frames, guided by a call of its own",
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        {**_SMALL, "ffn_dim": 128, "text_dim": 32},
        "blocks",
        random_wan.make_pipeline,
        _wan,
        {"height": 480, "width": 832, "num_frames": 81},
        {**_SMALL_SQUARE, "num_frames": 5},
    ),
    "z_image": RealPipeline(
        "Z-Image, 1024 x 1024, guided by half of its batch",
        "ZImageTransformer2DModel",
        {},
        {"dim": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32, "axes_dims": [8, 12, 12]},
        "layers",
        _z_image_pipeline,
        _z_image,
        _SQUARE,
        _SMALL_SQUARE,
    ),
}
