"""DiT's pipeline, tiny: classes instead of prompts, and pictures instead of latents."""

from typing import Any

from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build
from tests.support.zoo.parts_image import autoencoder, echo

MODEL: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
}


def make(scheduler: Any) -> Any:
    transformer = build(DiTTransformer2DModel, **MODEL)
    transformer = echo(transformer, transformer.proj_out_2)
    return DiTPipeline(transformer=transformer, vae=autoencoder(4, scaling_factor=1.0), scheduler=scheduler)


def arguments(pipe: Any, prompt: int) -> dict[str, Any]:
    del pipe
    return {"class_labels": [207 + prompt], "output_type": "pt"}


GUIDANCE: dict[str, Any] = {"guided": {}, "unguided": {"guidance_scale": 1.0}}

KINDS = [
    Kind("DiTPipeline", "DiT", lambda: make(DDIMScheduler(clip_sample=False)), arguments, **GUIDANCE),
    Kind("DiTPipeline [solver]", "DiT", lambda: make(DPMSolverMultistepScheduler()), arguments, **GUIDANCE),
]
