"""What `denoise` refuses before its first step."""

import json
import math
from typing import Any

import torch
from torch import Tensor

from afcache._checks import show
from afcache.functional.initial import StateShape, check_fit, check_values
from afcache.functional.state import CacheState
from afcache.sampling.origin import Origin
from afcache.sampling.result import Denoised
from afcache.settings.changes import OPEN
from afcache.settings.config import CacheConfig


def _is_same(x: Tensor, y: Tensor) -> bool:
    """Equal, NaN included: latents that are not finite are for the model to show, not for us to blame on the caller."""
    return x is y or (x.shape == y.shape and torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)))


def check_arguments(sigmas: Tensor, inputs: Any, negative: Any, guidance_scale: float) -> None:
    """Raise unless noise levels fall from at most 1 to at least 0, and guidance has what it needs.

    Raises:
        TypeError, ValueError: naming the argument, its value, the rule and the way out.

    """
    cure = "Take scheduler.sigmas after scheduler.set_timesteps, or torch.linspace(1, 0, steps + 1)."
    if not isinstance(sigmas, Tensor):
        raise TypeError(f"sigmas must be a tensor of noise levels, got {type(sigmas).__name__}. {cure}")
    if sigmas.is_complex() or sigmas.dtype == torch.bool:
        raise TypeError(f"sigmas must be real numbers, got {sigmas.dtype}. {cure}")
    levels = sigmas.to(torch.float32)
    if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((levels[1:] < levels[:-1]).all()):
        raise ValueError(
            "sigmas must be a falling sequence of at least two noise levels, distinct in float32, got shape "
            f"{tuple(sigmas.shape)}: {sigmas}. {cure}"
        )
    if float(sigmas[0]) > 1 or float(sigmas[-1]) < 0:
        raise ValueError(
            f"sigmas must lie in [0, 1], got {float(sigmas[0]):g} to {float(sigmas[-1]):g}: timesteps are 1000 times as large. "
            f"{cure}"
        )
    if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, int | float):
        way_out = "value.item() is a plain one" if hasattr(guidance_scale, "item") else "1 means no guidance"
        raise TypeError(f"guidance_scale must be one number for all samples, got {show(guidance_scale)}; {way_out}.")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be finite, got {guidance_scale!r}; 1 means no guidance.")
    if negative is None and guidance_scale != 1.0:
        raise ValueError(
            f"guidance_scale must be 1 without negative inputs, got {guidance_scale!r}. Pass negative=, or leave it out."
        )
    if negative is not None and not _is_same(negative.hidden_states, inputs.hidden_states):
        raise ValueError(
            f"negative.hidden_states {tuple(negative.hidden_states.shape)} must be inputs.hidden_states "
            f"{tuple(inputs.hidden_states.shape)}: both branches share the latents. Use inputs._replace(...)."
        )


def check_start(start: object, own: Denoised, sigmas: Tensor, shapes: list[StateShape], config: CacheConfig) -> None:
    """Raise unless a trajectory can be gone on with.

    Args:
        start: to be gone on with.
        own: what these arguments would start from, which tells what they are.
        sigmas: noise levels.
        shapes: of the states.
        config: settings.

    Raises:
        TypeError, ValueError: naming what does not fit.

    """
    if not isinstance(start, Denoised):
        raise TypeError(f"start must be what denoise or load_checkpoint returned, got {type(start).__name__}.")
    if start.target != config.target:
        raise ValueError(
            f"start must have the target of the config, {config.target!r}, got {start.target!r}: its states keep other values. "
            f"Go on with config=afcache.policy({start.target!r}), or start anew."
        )
    if len(start.states) != len(shapes):
        raise ValueError(
            f"start must have a state for each guidance branch, {len(shapes)}, got {len(start.states)}. Pass the same negative."
        )
    if start.origin is not None and own.origin is not None:
        _check_origin(start.origin, own.origin)
    latents = own.latents
    if start.latents.shape != latents.shape or start.latents.device != latents.device:
        raise ValueError(
            f"start.latents must have shape {tuple(latents.shape)} on {latents.device}, as inputs.hidden_states have, got "
            f"{tuple(start.latents.shape)} on {start.latents.device}."
        )
    for state, shape in zip(start.states, shapes, strict=True):
        check_fit(state, shape, config=config)
        # What is kept of outputs is float32, whatever the model's dtype, and was checked.
        dtype = state.history.dtype if config.forecasts_output else latents.dtype
        for name, tensor, kept_in in (("latents", start.latents, latents.dtype), ("states' history", state.history, dtype)):
            if (tensor.dtype, tensor.device) != (kept_in, latents.device):
                raise ValueError(
                    f"start's {name} must be {kept_in} on {latents.device}, where inputs.hidden_states are, got "
                    f"{tensor.dtype} on {tensor.device}. Go on in the dtype, and load_checkpoint on the device, of the model."
                )
        check_values(state, config=config)
        _check_levels(state, sigmas.float().cpu(), len(start.records))


def _check_origin(found: Origin, own: Origin) -> None:
    """Raise unless a trajectory is of what it shall be gone on with."""
    anyway = "To go on all the same, pass start._replace(origin=None)."
    if found.model != own.model:
        raise ValueError(
            f"transformer must be what start was computed with ({found.model}), got {own.model}. Load that one, its adapters "
            f"and their scales included. {anyway}"
        )
    for name, mine, other in zip(("inputs", "negative"), own.inputs, found.inputs, strict=False):
        if mine != other:
            raise ValueError(
                f"{name} must be what start was computed with (digest {other}), got others ({mine}): all but the latents must "
                f"be the same to the last bit. Pass the prompt of before. {anyway}"
            )
    if found.sigmas != own.sigmas:
        raise ValueError(
            f"sigmas must be what start was computed over, {len(found.sigmas)}: {show(found.sigmas)}, got {len(own.sigmas)}: "
            f"{show(own.sigmas)}. Go on over the same sigmas. {anyway}"
        )
    if found.guidance_scale != own.guidance_scale:
        raise ValueError(
            f"guidance_scale must be what start was computed with, {found.guidance_scale!r}, got {own.guidance_scale!r}. "
            f"{anyway}"
        )
    settings, before = json.loads(own.settings), json.loads(found.settings)
    others = [
        f"{name}={show(settings.get(name))} (start: {show(before.get(name))})"
        for name in sorted(settings.keys() | before.keys())
        if name not in OPEN and settings.get(name) != before.get(name)
    ]
    if others:
        raise ValueError(
            f"config may differ from what start was computed with in {', '.join(OPEN)} alone, got {', '.join(others)}. Use "
            f"dataclasses.replace on the config of before. {anyway}"
        )


def _check_levels(state: CacheState, sigmas: Tensor, done: int) -> None:
    """Raise unless what the state remembers was computed at these noise levels, before the step it goes on with."""
    filled = torch.arange(len(state.nodes))[:, None] < state.num_nodes.cpu()
    steps, nodes = state.steps.cpu()[filled].long(), state.nodes.cpu()[filled]
    if bool((steps >= min(done, len(sigmas))).any()):
        raise ValueError(
            f"start knows step {int(steps.max())}, but has {done} records, and there are {len(sigmas)} sigmas. Go on over the "
            "same sigmas, with the record of every step done."
        )
    if not torch.equal(sigmas[steps], nodes):
        raise ValueError(
            f"start was computed at other noise levels than sigmas: {nodes.tolist()} at steps {steps.tolist()}, which are "
            f"{sigmas[steps].tolist()} here. Go on over the same sigmas."
        )


def steps_left(start: Denoised, stop: int | None, steps: int) -> slice:
    """The steps from where a trajectory is to where it shall stop.

    Raises:
        ValueError: there are none, or not as many.

    """
    done, end = len(start.records), steps if stop is None else stop
    if isinstance(end, bool) or not isinstance(end, int) or not done < end <= steps:
        raise ValueError(
            f"stop must be a step after the {done} done and at most {steps}, got {stop!r}. A finished trajectory cannot go on."
        )
    return slice(done, end)
