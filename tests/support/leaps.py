"""Callers who leave the trajectory: callbacks that change latents, loops by hand, pipelines that share a transformer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

STEPS = 28
PROMPTS = ["a handwritten two on a palace", "a handwritten seven on a flower"]


def fresh_like(latents: Tensor, seed: int = 99) -> Tensor:
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)


def at_step(step: int, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Arguments of a call whose callback changes the latents after one step."""

    def callback(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        del pipe, timestep
        return {"latents": change(kwargs["latents"])} if index == step else {}

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents"]}


def embedded(pipe: Any, prompt: str = PROMPTS[0]) -> dict[str, Tensor]:
    with torch.no_grad():
        prompt_embeds, pooled, text_ids = pipe.encode_prompt(prompt=prompt, prompt_2=None, max_sequence_length=16)
    ids = FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
    return {"encoder_hidden_states": prompt_embeds, "pooled_projections": pooled, "txt_ids": text_ids, "img_ids": ids}


class Loop:
    """A loop by hand: one image's latents, stepped with a scheduler of its own or only by its noise levels."""

    def __init__(self, pipe: Any, scheduler: Any, seed: int, **inputs: Any) -> None:
        self._pipe, self.scheduler, self._inputs = pipe, scheduler, inputs
        size = pipe.transformer.config.in_channels
        self.latents = torch.randn(1, 64, size, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def velocity(self, index: int) -> Tensor:
        timestep = self.scheduler.timesteps[index].expand(1) / 1000
        return self._pipe.transformer(self.latents, timestep=timestep, return_dict=False, **self._inputs)[0]

    def step(self, index: int) -> None:
        sigmas = self.scheduler.sigmas
        self.latents = self.latents + (sigmas[index + 1] - sigmas[index]) * self.velocity(index)


def prepared(pipe: Any) -> Any:
    """The pipeline's scheduler, over a schedule as FLUX has it."""
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=0.8)
    return pipe.scheduler


def latents_quality(latents: Tensor, reference: Tensor) -> float:
    return -10 * float(((latents - reference).double().square().mean() / reference.double().square().mean()).log10())


def with_own_scheduler(pipe: Any) -> Any:
    """Another pipeline around the same transformer."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    other = FluxPipeline(**{**pipe.components, "scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    return other
