"""FLUX of random weights, for costs: it needs nothing but torch and diffusers."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

TEXT_TOKENS = 64


class Size(NamedTuple):
    """A FLUX of random weights: width, blocks of both kinds, image tokens."""

    dim: int
    double: int
    single: int
    tokens: int


SIZES = {
    "tiny": Size(64, 1, 2, 16),
    "small": Size(512, 4, 8, 256),
    "medium": Size(768, 6, 12, 576),
    "flux1": Size(3072, 19, 38, 4096),
}


def make_transformer(*, dim: int, double: int, single: int) -> Any:
    """FLUX with random weights."""
    torch.manual_seed(0)
    head_dim = 128 if dim >= 3072 else 64 if dim >= 512 else 32
    rotary = {128: (16, 56, 56), 64: (8, 28, 28), 32: (4, 14, 14)}[head_dim]
    return FluxTransformer2DModel(
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=head_dim,
        num_attention_heads=dim // head_dim,
        axes_dims_rope=rotary,
        in_channels=64,
        joint_attention_dim=dim,
        pooled_projection_dim=dim,
        guidance_embeds=True,
    ).eval()


def make_pipeline(transformer: Any) -> Any:
    """A real FluxPipeline around it, without text encoders and decoder: the loop users run."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(scheduler=scheduler, transformer=transformer, **parts)  # pyright: ignore[reportArgumentType]
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_flux1(size: Size, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """FLUX.1-dev's own configuration but for width and number of blocks, which are its own, too, for the size "flux1".

    Made on the device in its own precision: in float32 it would need twice its memory for a moment.
    """
    head_dim = 128 if size.dim >= 3072 else 64
    with torch.device(device), default_dtype(dtype):
        return FluxTransformer2DModel(
            num_layers=size.double,
            num_single_layers=size.single,
            attention_head_dim=head_dim,
            num_attention_heads=size.dim // head_dim,
            axes_dims_rope=(16, 56, 56) if head_dim == 128 else (8, 28, 28),
            guidance_embeds=True,
        ).eval()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make tensors of another dtype inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def draw_random(pipe: Any, tokens: int, *, seed: int = 0, steps: int = 28, true_cfg_scale: float = 1.0) -> np.ndarray:
    """Latents of random weights; a guidance scale above 1 adds a negative prompt."""
    dim = pipe.transformer.config.joint_attention_dim
    side = int(tokens**0.5) * 16
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randn(1, TEXT_TOKENS, dim, generator=generator).to(pipe.device, pipe.dtype)
    pooled = torch.randn(1, dim, generator=generator).to(pipe.device, pipe.dtype)
    guided: dict[str, Any] = {}
    if true_cfg_scale > 1:
        guided = {"negative_prompt_embeds": -prompt, "negative_pooled_prompt_embeds": -pooled, "true_cfg_scale": true_cfg_scale}
    latents = pipe(
        prompt_embeds=prompt,
        pooled_prompt_embeds=pooled,
        height=side,
        width=side,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
        **guided,
    ).images
    return latents[0].float().cpu().numpy()
