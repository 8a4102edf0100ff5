"""HiDream's pipeline, tiny. It chooses a size itself, of the area of its default."""

from typing import Any

import torch
from diffusers import FlowMatchLCMScheduler, HiDreamImagePipeline, HiDreamImageTransformer2DModel, UniPCMultistepScheduler

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, noise
from tests.support.zoo.parts_image import autoencoder, pooled, square

T5 = 24
LLAMA = 20
POOLED = 12
MODEL: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "caption_channels": [T5, LLAMA],
    "text_emb_dim": POOLED,
    "axes_dims_rope": (8, 4, 4),
    "max_resolution": (8, 8),
    "llama_layers": [0, 1, 2, 2],
    "force_inference_output": True,
}


class SeededLCM(FlowMatchLCMScheduler):
    """The pipeline gives it no generator, so its noise would be the global one's. Here the first latents decide."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
        if self.step_index is None:
            self.source = torch.Generator().manual_seed(int(1e6 * sample.abs().sum()))
        return super().step(model_output, timestep, sample, **{**options, "generator": self.source})


def make(scheduler: Any) -> Any:
    texts = {f"{part}{suffix}": None for part in ("text_encoder", "tokenizer") for suffix in ("", "_2", "_3", "_4")}
    vae = autoencoder(4, shift_factor=0.12, scaling_factor=0.36)
    transformer = build(HiDreamImageTransformer2DModel, **MODEL)
    pipe = HiDreamImagePipeline(scheduler=scheduler, vae=vae, transformer=transformer, **texts)  # pyright: ignore[reportArgumentType]
    pipe.default_sample_size = 8
    return pipe


def full() -> Any:
    return make(UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0))


def texts(prompt: int, prefix: str = "") -> dict[str, Any]:
    return {
        f"{prefix}prompt_embeds_t5": embeddings(prompt, 7, T5),
        f"{prefix}prompt_embeds_llama3": noise(3, 1, 7, LLAMA, seed=400 + prompt),
        f"{prefix}pooled_prompt_embeds": pooled(prompt, POOLED),
    }


def arguments(pipe: Any, prompt: int) -> dict[str, Any]:
    del pipe
    return {**texts(prompt), **texts(2, "negative_"), **square(16), "output_type": "latent"}


def unguided(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**arguments(pipe, prompt), "guidance_scale": 0.0}


KINDS = [
    Kind("HiDreamImagePipeline", "HiDream", full, arguments, guided={}, unguided={"guidance_scale": 1.0}),
    Kind("HiDreamImagePipeline [Dev]", "HiDream", lambda: make(SeededLCM(shift=6.0)), unguided, unguided={}),
]
