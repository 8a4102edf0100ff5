"""The options of a drawing: which words of the command line become which arguments of a pipeline's call."""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afcache.assets import recommended_settings
from afcache.cli.model import Model, part_config

# What pipelines call that which an option asks for; the first name that a call has is used.
NAMES: dict[str, tuple[str, ...]] = {
    "steps": ("num_inference_steps",),
    "height": ("height",),
    "width": ("width",),
    "num_frames": ("num_frames", "frames"),
    "true_cfg_scale": ("true_cfg_scale",),
    "guidance_scale": ("guidance_scale",),
    "negative_prompt": ("negative_prompt",),
    "max_sequence_length": ("max_sequence_length",),
}
_RATE = "frame_rate"
# Frames per second of videos whose pipelines do not ask for it.
_USUAL_RATE = 16


def check_drawing(arguments: argparse.Namespace) -> None:
    """Refuse what no model can draw.

    Raises:
        ValueError: an option is out of its range or has no effect.

    """
    scale = arguments.true_cfg_scale
    if scale is not None and not 1 <= scale < math.inf:
        raise ValueError(f"--true-cfg-scale must be finite and >= 1 (1 switches guidance off), got {scale:g}.")
    plain = arguments.guidance_scale
    if plain is not None and not 0 <= plain < math.inf:
        raise ValueError(f"--guidance-scale must be finite and >= 0, got {plain:g}.")
    if arguments.negative_prompt is not None and scale == 1:
        raise ValueError(_without_guidance())


def check_sizes(model: Model, arguments: argparse.Namespace) -> None:
    """Refuse sizes that a model cannot draw, as far as its files tell: what others cannot, their pipelines say.

    Raises:
        ValueError: a size is no multiple of what the model's latents need.

    """
    if model.parts.get("vae") != ("diffusers", "AutoencoderKL"):
        return
    recommended = recommended_settings(Path(model.name))
    # Every block of this VAE but the first halves the picture, and a latent token is 2 x 2.
    multiple = 2 ** len(part_config(model, "vae", "block_out_channels")["block_out_channels"])
    for name in ("height", "width"):
        asked = getattr(arguments, name)
        value = asked or recommended.get(name)
        if value is not None and value % multiple:
            where = f"--{name}" if asked else f"--model {model.name!r}: {name} in recommended.json"
            raise ValueError(f"{where} must be a multiple of {multiple} for this model, got {value}.")


def call_options(
    model: Model, call: Mapping[str, Any], arguments: argparse.Namespace, *, embeds_guidance: bool
) -> dict[str, Any]:
    """What the pipeline is called with, besides prompt and generator: what was asked for, else what is recommended.

    Args:
        model: with settings beside it that are recommended, perhaps.
        call: the parameters of the pipeline's call, by name, with their defaults.
        arguments: of the command line.
        embeds_guidance: whether a guidance scale is an input of the transformer.

    Raises:
        ValueError: the pipeline does not take what is asked for, or it would have no effect.

    """
    asked = {option: getattr(arguments, option) for option in NAMES if getattr(arguments, option) is not None}
    for option in asked:
        _check_taken(model, call, option, NAMES[option], embeds_guidance=embeds_guidance)
    if getattr(arguments, "fps", None) is not None:
        _check_taken(model, call, "fps", NAMES["num_frames"], embeds_guidance=embeds_guidance)
    if "guidance_scale" in asked and "true_cfg_scale" in call and not embeds_guidance:
        raise ValueError("--guidance-scale: this model has no guidance embedding; use --true-cfg-scale.")
    recommended = {option: value for option, value in recommended_settings(Path(model.name)).items() if option in NAMES}
    wanted = {**recommended, **asked}
    scale = wanted.get("true_cfg_scale", call.get("true_cfg_scale"))
    if "true_cfg_scale" in call and scale is not None:
        if "negative_prompt" in asked and scale <= 1:
            raise ValueError(_without_guidance())
        # These pipelines are guided by nothing less than a negative prompt.
        if "true_cfg_scale" in wanted and scale > 1:
            wanted.setdefault("negative_prompt", "")
    taken = {option: _taken(call, NAMES[option]) for option in wanted}
    options = {name: wanted[option] for option, name in taken.items() if name is not None}
    if getattr(arguments, "fps", None) is not None and _RATE in call:
        options[_RATE] = arguments.fps
    return options


def makes_video(call: Mapping[str, Any]) -> bool:
    """Whether a pipeline draws several frames."""
    return _taken(call, NAMES["num_frames"]) is not None


def frames_per_second(call: Mapping[str, Any], fps: int | None) -> float:
    """At which a video is written: what was asked for, else what its pipeline draws for."""
    return fps or call.get(_RATE) or _USUAL_RATE


def options_of(call: Mapping[str, Any], *, embeds_guidance: bool) -> list[str]:
    """The options of the command line that a pipeline takes."""
    # Where guidance is true CFG, the other scale is one that the transformer has an input for, or without effect.
    idle = {"guidance_scale"} if "true_cfg_scale" in call and not embeds_guidance else set()
    options = [_flag(option) for option, names in NAMES.items() if option not in idle and _taken(call, names) is not None]
    return [*options, "--fps"] if makes_video(call) else options


def _check_taken(model: Model, call: Mapping[str, Any], option: str, names: tuple[str, ...], *, embeds_guidance: bool) -> None:
    if _taken(call, names) is None:
        taken = ", ".join(options_of(call, embeds_guidance=embeds_guidance))
        raise ValueError(f"{_flag(option)}: a {model.pipeline} takes no such option; it takes {taken}.")


def _taken(call: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in call), None)


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def _without_guidance() -> str:
    return "--negative-prompt has no effect without guidance; give --true-cfg-scale above 1, too."
