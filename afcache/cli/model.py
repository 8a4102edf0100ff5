"""The model of the command line: found, and what it can draw known, before any weight is loaded."""

import argparse
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afcache._checks import show
from afcache.assets import mini_flux_folder, recommended_settings
from afcache.cli.silence import quiet_imports

MINI_PROMPTS = (
    "a handwritten seven on a flower",
    "a handwritten three on a palace",
    "a handwritten five on a flower",
    "a handwritten eight on a palace",
)


@dataclass(frozen=True)
class Job:
    """One image to draw, and its file name without extension."""

    prompt: str
    seed: int
    stem: str


def make_jobs(arguments: argparse.Namespace) -> list[Job]:
    """Every prompt with the same seeds; the default prompts with one seed each, to show different pictures."""
    seeds = [arguments.seed + i for i in range(arguments.num_images)]
    if arguments.prompt:
        pairs = [(prompt, seed) for prompt in arguments.prompt for seed in seeds]
    else:
        pairs = [(prompt, seed + i) for i, prompt in enumerate(MINI_PROMPTS) for seed in seeds]
    stems: list[str] = []
    for prompt, seed in pairs:
        stem = f"{_name(prompt)}_seed{seed}"
        # The same prompt may be asked for twice; no picture overwrites another.
        stems.append(stem if stem not in stems else f"{stem}_{len(stems)}")
    return [Job(prompt, seed, stem) for (prompt, seed), stem in zip(pairs, stems, strict=True)]


def _name(prompt: str) -> str:
    """A prompt as a file name: its words, and where these leave something out, a mark that tells it from all others."""
    words = "".join(letter if letter.isalnum() else "_" for letter in prompt.lower())[:40].strip("_")
    if words.replace("_", " ") == prompt:
        return words
    mark = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    return f"{words}_{mark}" if words else mark


def check_drawing(arguments: argparse.Namespace) -> None:
    """Refuse what no model can draw.

    Raises:
        ValueError: an option is out of its range or has no effect.

    """
    scale = arguments.true_cfg_scale
    if scale is not None and not 1 <= scale < math.inf:
        raise ValueError(f"--true-cfg-scale must be finite and >= 1 (1 switches guidance off), got {scale:g}.")
    distilled = arguments.guidance_scale
    if distilled is not None and not 0 <= distilled < math.inf:
        raise ValueError(f"--guidance-scale must be finite and >= 0, got {distilled:g}.")
    if arguments.negative_prompt is not None and (scale == 1 or (scale is None and arguments.model is not None)):
        raise ValueError("--negative-prompt has no effect without guidance; give --true-cfg-scale above 1, too.")
    if not arguments.prompt and arguments.model is not None:
        raise ValueError("--prompt is needed with --model; only mini-FLUX has default prompts.")


def resolve_model(model: str | None) -> str:
    """A folder or hub id that names a FluxPipeline.

    Raises:
        ValueError: it does not, or the hub cannot be reached.

    """
    if model is None:
        return str(mini_flux_folder())
    is_hub_id = model.count("/") == 1 and not model.startswith((".", "/", "~")) and not os.path.exists(model)
    if not is_hub_id and not os.path.isdir(model):
        raise ValueError(f"--model {model!r}: no such folder (a hub id looks like black-forest-labs/FLUX.1-dev).")
    if not is_hub_id and not (Path(model) / "model_index.json").is_file():
        raise ValueError(f"--model {model!r} has no model_index.json: it is not a diffusers pipeline folder.")
    config = _load_config(model, "") if is_hub_id else _read_config(model, "model_index.json")
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name != "FluxPipeline":
        raise ValueError(
            f"--model {model!r} is a {name}, not a FluxPipeline, which is all that the command draws with. In Python, "
            "afcache.compile_pipeline takes other families (docs/compatibility.md)."
        )
    return model


def part_config(model: str, name: str, *needed: str) -> dict[str, Any]:
    """The configuration of a part of the pipeline, "transformer" or "vae", read without its weights.

    Args:
        model: a folder or hub id.
        name: of the part.
        needed: entries that it must have.

    Raises:
        ValueError: the model has none that can be read, or that lacks one of these.

    """
    config = _read_config(model, f"{name}/config.json") if os.path.isdir(model) else _load_config(model, name)
    missing = [entry for entry in needed if not isinstance(config, dict) or entry not in config]
    if missing or not isinstance(config, dict):
        raise ValueError(
            f"--model {model!r}: {name}/config.json must be an object with {', '.join(needed) or 'settings'}, got "
            f"{show(config)}. Download the model again, or mend the file."
        )
    return config


def sampling_options(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the pipeline is called with, besides prompt and generator.

    Raises:
        ValueError: the model cannot draw what is asked for.

    """
    recommended = recommended_settings(Path(model))
    options: dict[str, Any] = {"num_inference_steps": arguments.steps}
    # Every block of the VAE but the first halves the picture, and a latent token is 2 x 2.
    multiple = 2 ** len(part_config(model, "vae", "block_out_channels")["block_out_channels"])
    for name in ("height", "width"):
        asked = getattr(arguments, name)
        value = asked or recommended.get(name)
        if value is not None and value % multiple:
            where = f"--{name}" if asked else f"--model {model!r}: {name} in recommended.json"
            raise ValueError(f"{where} must be a multiple of {multiple} for this model, got {value}.")
        if value is not None:
            options[name] = value
    length = arguments.max_sequence_length or recommended.get("max_sequence_length")
    if length is not None:
        options["max_sequence_length"] = length
    scale = arguments.true_cfg_scale or recommended.get("true_cfg_scale", 1.0)
    if scale > 1:
        options.update(true_cfg_scale=scale, negative_prompt=arguments.negative_prompt or "")
    if arguments.guidance_scale is not None:
        if not part_config(model, "transformer").get("guidance_embeds"):
            raise ValueError("--guidance-scale: this model has no guidance embedding; use --true-cfg-scale.")
        options["guidance_scale"] = arguments.guidance_scale
    return options


def _read_config(folder: str, name: str) -> Any:
    """A file of a model's folder, as it is, without diffusers, which takes seconds to import."""
    try:
        return json.loads((Path(folder) / name).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {folder!r}: {name} cannot be read: {error}") from error


def _load_config(model: str, part: str) -> Any:
    """The same from the Hugging Face hub."""
    with quiet_imports():
        from diffusers import AutoencoderKL, DiffusionPipeline, FluxTransformer2DModel

    kinds: dict[str, Any] = {"": DiffusionPipeline, "vae": AutoencoderKL, "transformer": FluxTransformer2DModel}
    try:
        # Warnings tell of every attempt to reach the hub; what came of them is in the error.
        with quiet_imports():
            return kinds[part].load_config(model, subfolder=part or None)
    except OSError as error:
        if _is_unreachable(error):
            raise ValueError(
                f"--model {model!r} is a hub id, and the Hugging Face hub cannot be reached; nor is the model kept on this "
                "machine. Go online, or give the folder of a pipeline that was downloaded."
            ) from error
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"--model {model!r} could not be loaded from the Hugging Face hub: {first}") from error


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether there was no connection; diffusers says then that the model has no such file."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | ConnectionError):
            return True
        error = error.__cause__ or error.__context__
    return False
