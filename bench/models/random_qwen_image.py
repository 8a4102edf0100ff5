"""Qwen-Image of random weights, for costs."""

from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

from bench.models.random_parts import Size, two_prompts

# What its pipeline has by default; with a negative prompt the transformer is called twice a step.
GUIDANCE = 4.0
_ROTARY = {128: (16, 56, 56), 32: (4, 14, 14)}


# The real one has 24 heads of 128 and 60 blocks.
SIZES = {"tiny": Size(2, 32, 2, 16), "small": Size(4, 128, 6, 256)}


def make_transformer(size: Size) -> Any:
    """Qwen-Image with random weights."""
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        num_layers=size.layers,
        attention_head_dim=size.head_dim,
        num_attention_heads=size.heads,
        axes_dims_rope=_ROTARY[size.head_dim],
        joint_attention_dim=size.heads * size.head_dim,
    ).eval()


def make_pipeline(transformer: Any) -> Any:
    """A real QwenImagePipeline around it, with the scheduler of the hub."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0,
        use_dynamic_shifting=True,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        base_shift=0.5,
        max_shift=0.9,
        shift_terminal=0.02,
    )
    parts: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipe = QwenImagePipeline(scheduler=scheduler, transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_random(pipe: Any, tokens: int, *, seed: int = 0, steps: int = 28) -> np.ndarray:
    """Latents of a prompt and a negative one, both as long, as nothing but embeddings."""
    side = int(tokens**0.5) * 16
    generator = torch.Generator().manual_seed(seed)
    prompt, negative = two_prompts(pipe, pipe.transformer.config.joint_attention_dim, generator)
    mask = torch.ones(prompt.shape[:2], dtype=torch.int64, device=pipe.device)
    latents = pipe(
        prompt_embeds=prompt,
        prompt_embeds_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_embeds_mask=mask,
        true_cfg_scale=GUIDANCE,
        height=side,
        width=side,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
    ).images
    return latents[0].float().cpu().numpy()
