"""What users do in a callback, to a pipeline and to its uncached twin."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import afcache
from tests.support.leaps import PROMPTS, embedded, fresh_like
from tests.support.sampling import sample


class AbortedError(Exception):
    """Raised in a callback."""


# What a callback does at its step: (pipe, step, latents, the machine) -> arguments that the pipeline goes on with.
Event = Callable[[Any, int, Tensor, Any], dict[str, Any]]


def _replace(pipe: Any, step: int, latents: Tensor, users: Any) -> dict[str, Any]:
    del users
    return {"latents": fresh_like(latents) * float(pipe.scheduler.sigmas[step + 1])}


def _preview(pipe: Any, step: int, latents: Tensor, users: Any) -> dict[str, Any]:
    del users
    if step + 1 < len(pipe.scheduler.timesteps):
        inputs = embedded(pipe, PROMPTS[1])
        batch = latents.shape[0]
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].to(latents.dtype).expand(batch, -1, -1)
        inputs["pooled_projections"] = inputs["pooled_projections"].to(latents.dtype).expand(batch, -1)
        timestep = (pipe.scheduler.timesteps[step + 1].expand(batch) / 1000).to(latents.dtype)
        with torch.no_grad():
            pipe.transformer(latents, timestep=timestep, return_dict=False, **inputs)
    return {}


def _other_prompt(pipe: Any, step: int, latents: Tensor, users: Any) -> dict[str, Any]:
    del step, users
    embeds = embedded(pipe, "a handwritten nine on a flower")["encoder_hidden_states"]
    return {"prompt_embeds": embeds.to(latents.dtype).expand(latents.shape[0], -1, -1)}


def _nested(pipe: Any, step: int, latents: Tensor, users: Any) -> dict[str, Any]:
    del step, latents
    inner = users.inner[users.is_cached(pipe)]
    users.side_images[users.is_cached(pipe)].append(torch.from_numpy(sample(inner, 5, steps=9, output_type="latent")))
    return {}


def _edit_sigmas(pipe: Any, step: int, latents: Tensor, users: Any) -> dict[str, Any]:
    del latents, users
    pipe.scheduler.sigmas[step + 2 : -1] *= 0.95
    return {}


def _interrupt(pipe: Any, step: int, latents: Tensor, users: Any) -> dict[str, Any]:
    del step, latents, users
    pipe._interrupt = True
    return {}


def _abort(pipe: Any, step: int, latents: Tensor, users: Any) -> dict[str, Any]:
    raise AbortedError


def _compile_again(pipe: Any, step: int, latents: Tensor, users: Any) -> dict[str, Any]:
    del step, latents
    if users.is_cached(pipe):
        afcache.compile_pipeline(pipe, compile=False, tolerance=0.005)
    return {}


def _restore(pipe: Any, step: int, latents: Tensor, users: Any) -> dict[str, Any]:
    del step, latents
    if users.is_cached(pipe):
        afcache.restore_pipeline(pipe)
        users.restored.append(pipe)
    return {}


def _scale_adapter(pipe: Any, step: int, latents: Tensor, users: Any) -> dict[str, Any]:
    del step, latents, users
    if "lora" in pipe.get_list_adapters().get("transformer", []):
        pipe.set_adapters("lora", 0.5)
    return {}


EVENTS: dict[str, Event] = {
    "nothing": lambda *_: {},
    "replace": _replace,
    "permute": lambda _pipe, _step, latents, _users: {"latents": latents.flip(0)},
    "scale": lambda _pipe, _step, latents, _users: {"latents": latents * 1.3},
    "noise": lambda _pipe, _step, latents, _users: {"latents": latents + 0.02 * fresh_like(latents)},
    "preview": _preview,
    "other prompt": _other_prompt,
    "nested": _nested,
    "edit sigmas": _edit_sigmas,
    "interrupt": _interrupt,
    "abort": _abort,
    "compile again": _compile_again,
    "restore": _restore,
    "scale adapter": _scale_adapter,
}
