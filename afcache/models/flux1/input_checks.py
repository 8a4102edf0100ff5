"""Whether inputs that somebody made by hand fit a FLUX.1 transformer, and each other."""

from typing import Any

import torch
from torch import Tensor

from afcache._checks import show
from afcache._typing import HostModule
from afcache.models.flux1.checks import check_groups
from afcache.models.flux1.inputs import FluxInputs
from afcache.settings.config import CacheConfig


def check_inputs(name: str, value: Any, transformer: HostModule, config: CacheConfig) -> None:
    """Raise unless inputs that somebody made by hand fit the transformer and the settings.

    Raises:
        TypeError, ValueError: naming the field, its value, and what it must be.
        NotImplementedError: reference images with groups of blocks.

    """
    if not isinstance(value, FluxInputs):
        raise TypeError(
            f"{name} must be afcache.FluxInputs, got {type(value).__name__}. Make them with afcache.FluxInputs(...)."
        )
    _check_tensors(name, value)
    _check_shapes(name, value, transformer)
    if value.hidden_states.dtype != transformer.dtype:
        raise ValueError(
            f"{name}.hidden_states must have the transformer's dtype {transformer.dtype}, got {value.hidden_states.dtype}. "
            "Convert them, or the transformer, with .to(dtype)."
        )
    _check_alike(name, value)
    latents, condition = value.hidden_states.shape[2], 0 if value.condition is None else value.condition.shape[2]
    if latents != transformer.out_channels or latents + condition != transformer.config.in_channels:
        others = transformer.config.in_channels - transformer.out_channels
        raise ValueError(
            f"{name}.hidden_states must have the latents' {transformer.out_channels} channels and {name}.condition "
            f"{f'the other {others}' if others else 'must be None'} for this transformer, got {latents} and {condition}. "
            "Control images and masks are the condition; reference images are the context."
        )
    if value.controlnet_block_samples or value.controlnet_single_block_samples:
        raise ValueError(
            f"{name}.controlnet_block_samples and controlnet_single_block_samples must be empty: a ControlNet's residuals are "
            "others at every step. Call afcache.denoising_step with those of each, or use a pipeline."
        )
    takes_guidance = bool(transformer.config.guidance_embeds)
    if (value.guidance is not None) != takes_guidance:
        expected = "a scale for each sample" if takes_guidance else "None"
        raise ValueError(f"{name}.guidance must be {expected} for this transformer, got {value.guidance!r}.")
    if value.image_prompts and getattr(transformer, "encoder_hid_proj", None) is None:
        raise ValueError(
            f"{name}.image_prompts must be empty for a transformer without an IP-Adapter, got {len(value.image_prompts)}. Load "
            "one with pipe.load_ip_adapter(...)."
        )
    if value.context is not None:
        check_groups(config)


def _check_tensors(name: str, value: FluxInputs) -> None:
    """Raise unless every field is a tensor, or None where that is a choice."""
    for field in ("hidden_states", "encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids"):
        _check_tensor(f"{name}.{field}", getattr(value, field), "")
    for field in ("guidance", "image_prompt_scales", "context", "context_ids", "condition"):
        if getattr(value, field) is not None:
            _check_tensor(f"{name}.{field}", getattr(value, field), ", or None")
    for field in ("controlnet_block_samples", "controlnet_single_block_samples", "image_prompts"):
        parts = getattr(value, field)
        if not isinstance(parts, tuple):
            raise TypeError(f"{name}.{field} must be a tuple of tensors, got {show(parts)}. Leave it out, or use tuple(...).")
        for index, part in enumerate(parts):
            _check_tensor(f"{name}.{field}[{index}]", part, "")


def _check_tensor(name: str, value: object, choice: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor{choice}, got {show(value)}; see afcache.FluxInputs for its shape.")


def _check_shapes(name: str, value: FluxInputs, transformer: HostModule) -> None:
    """Raise unless the axes of all fields agree with each other and with the transformer."""
    settings = transformer.config
    axes = len(settings.axes_dims_rope)
    # None is free: the batch and the numbers of tokens are what these are.
    expected: dict[str, tuple[tuple[int | None, ...], str]] = {
        "hidden_states": ((None, None, None), ""),
        "encoder_hidden_states": ((None, None, settings.joint_attention_dim), "the last is the model's width of text"),
        "pooled_projections": ((None, settings.pooled_projection_dim), "the last is the model's width of pooled text"),
        "img_ids": ((None, axes), "positions of every image token"),
        "txt_ids": ((None, axes), "positions of every text token"),
        "context": ((None, None, None), ""),
        "context_ids": ((None, axes), "positions of every token of the context"),
        "condition": ((None, None, None), ""),
        "guidance": ((None,), "a scale for each sample"),
    }
    for field, (axis_sizes, what) in expected.items():
        _check_axes(f"{name}.{field}", getattr(value, field), axis_sizes, what)
    batch, img_seq, _ = value.hidden_states.shape
    if not batch or not img_seq:
        raise ValueError(
            f"{name}.hidden_states must have at least one sample and one token, got shape {tuple(value.hidden_states.shape)}."
        )
    for field in ("encoder_hidden_states", "pooled_projections", "context", "condition", "guidance"):
        part = getattr(value, field)
        if part is not None and part.shape[0] != batch:
            raise ValueError(
                f"{name}.{field} must have as many samples as hidden_states, {batch}, got shape {tuple(part.shape)}. Repeat it "
                "for every image."
            )
    if (value.context is None) != (value.context_ids is None):
        raise ValueError(
            f"{name}.context and context_ids must be given together, got one of them. Positions are [context_seq, {axes}]."
        )
    for field, tokens in (("img_ids", "hidden_states"), ("txt_ids", "encoder_hidden_states"), ("context_ids", "context")):
        if getattr(value, field) is not None:
            _check_length(name, field, getattr(value, field), tokens, getattr(value, tokens))
    if value.condition is not None:
        _check_length(name, "condition", value.condition[0], "hidden_states", value.hidden_states)


def _check_axes(name: str, value: Tensor | None, sizes: tuple[int | None, ...], what: str) -> None:
    shape = None if value is None else tuple(value.shape)
    if shape is None:
        return
    if len(shape) != len(sizes):
        raise ValueError(f"{name} must have {len(sizes)} axes, got shape {shape}; see afcache.FluxInputs.")
    if any(size not in (None, found) for size, found in zip(sizes, shape, strict=True)):
        raise ValueError(f"{name} must have {sizes[-1]} on its last axis ({what}), got shape {shape}; see afcache.FluxInputs.")


def _check_length(name: str, field: str, rows: Tensor, tokens: str, sequence: Tensor) -> None:
    if rows.shape[0] != sequence.shape[1]:
        raise ValueError(
            f"{name}.{field} must have a row for each token of {tokens}, {sequence.shape[1]}, got {rows.shape[0]}. Make it of "
            "the same height and width, or text length."
        )


def _check_alike(name: str, value: FluxInputs) -> None:
    """Raise unless what meets the latents in a layer has their dtype and device; under autocast layers cast by themselves."""
    latents = value.hidden_states
    is_cast = torch.is_autocast_enabled(latents.device.type)
    for field in ("encoder_hidden_states", "pooled_projections", "context", "condition", "img_ids", "txt_ids", "context_ids"):
        part = getattr(value, field)
        if part is None:
            continue
        if part.device != latents.device:
            raise ValueError(
                f"{name}.{field} must be on the device of hidden_states, {latents.device}, got {part.device}. Move it with "
                ".to(device)."
            )
        if part.dtype != latents.dtype and not is_cast and not field.endswith("_ids"):
            raise ValueError(
                f"{name}.{field} must have the dtype of hidden_states, {latents.dtype}, got {part.dtype}. Convert it with "
                ".to(dtype)."
            )
