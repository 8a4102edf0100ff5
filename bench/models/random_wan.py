"""Wan 2.1, text to video, of random weights, for costs."""

from typing import Any

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from bench.models.random_parts import Size, two_prompts

# Of the latents; four pictures make one of them, after the first.
FRAMES = 5
# What its pipeline has by default; the transformer is called twice a step.
GUIDANCE = 5.0


# The smallest that was trained has 12 heads of 128 and 30 blocks.
SIZES = {"tiny": Size(2, 32, 2, 20), "small": Size(3, 128, 6, 320)}


def make_transformer(size: Size) -> Any:
    """Wan with random weights; its MLPs are wider than the rest by as much as the smallest trained one's."""
    torch.manual_seed(0)
    width = size.heads * size.head_dim
    return WanTransformer3DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        num_layers=size.layers,
        ffn_dim=width * 35 // 6,
        text_dim=width,
    ).eval()


def make_pipeline(transformer: Any) -> Any:
    """A real WanPipeline around it, with the scheduler of the hub."""
    scheduler: Any = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipe = WanPipeline(scheduler=scheduler, transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_random(pipe: Any, tokens: int, *, seed: int = 0, steps: int = 28) -> np.ndarray:
    """Latents of a video of a prompt and a negative one, both as long, as Wan's own are; nothing but embeddings."""
    side = int((tokens // FRAMES) ** 0.5) * 16
    generator = torch.Generator().manual_seed(seed)
    prompt, negative = two_prompts(pipe, pipe.transformer.config.text_dim, generator)
    latents = pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        guidance_scale=GUIDANCE,
        height=side,
        width=side,
        num_frames=4 * FRAMES - 3,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
    ).frames
    return latents[0].float().cpu().numpy()
