"""`afcache generate`: load a pipeline, draw, compare, write; and `afcache calibrate`, which draws to find settings."""

import argparse
import math
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FluxPipeline, FluxTransformer2DModel

from afcache.assets import mini_flux_folder, recommended_settings
from afcache.calibration.tolerance import calibrate, check_targets
from afcache.cli import processes
from afcache.cli.comparison import Draw, Job, compare, save, timed, write_report
from afcache.models.flux1.architecture import sizes
from afcache.parallel.config import ParallelConfig
from afcache.pipeline import compile_pipeline
from afcache.reports.records import report
from afcache.settings.config import CacheConfig
from afcache.settings.policies import policy
from afcache.settings.presets import resolve_config

_MINI_PROMPTS = (
    "a handwritten seven on a flower",
    "a handwritten three on a palace",
    "a handwritten five on a flower",
    "a handwritten eight on a palace",
)
_COMPILE_SECONDS_PER_BLOCK = {"cpu": 5.0, "cuda": 1.5}


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks.

    Raises:
        ValueError, NotImplementedError, OSError: anything a user can mend; the message says how.

    """
    _check_arguments(arguments)
    settings = _settings(arguments)
    device = processes.own_device(arguments.device, _device(arguments.device))
    compiles = not (arguments.no_compile or arguments.no_cache)
    if compiles and (problem := missing_compiler(device)):
        raise OSError(problem)
    jobs = _jobs(arguments)
    folder = _resolve_model(arguments.model)
    options = _sampling_options(folder, arguments)
    parallel = _share_out(arguments, folder, options, device)
    # Processes other than the first draw along; they print and write nothing.
    output = _make_folder(arguments.output) if processes.is_first() else None
    pipe = _load(folder, arguments, device)
    draw = Draw(pipe, options)
    if not arguments.no_cache:
        compile_pipeline(pipe, settings, compile=compiles, parallel=parallel)
    if output is None:
        pipe.set_progress_bar_config(disable=True)
    else:
        _announce(pipe, parallel, compiles, device)
    if arguments.compare:
        compare(draw, jobs, settings, compiles=compiles, output=output, parallel=parallel)
    else:
        _draw_all(draw, jobs, compiles=compiles, is_cached=not arguments.no_cache, output=output)
    if output is not None:
        print(f"written to {output}/")
    processes.part()


def calibrate_model(arguments: argparse.Namespace) -> None:
    """Find settings for what the command line asks, print the curve and write them.

    Raises:
        ValueError, NotImplementedError, OSError: anything a user can mend; the message says how.

    """
    check_targets(arguments.target_speedup, arguments.target_psnr)
    _check_drawing(arguments)
    if processes.count() > 1:
        raise ValueError("calibrate runs in one process; start it without torchrun. What it finds holds for several, too.")
    if arguments.output.is_dir() or not arguments.output.parent.is_dir():
        raise ValueError(f"--output must be a file in a folder that exists, got {str(arguments.output)!r}.")
    device, jobs = _device(arguments.device), _jobs(arguments)
    folder = _resolve_model(arguments.model)
    options = _sampling_options(folder, arguments)
    pipe = _load(folder, arguments, device)
    config = calibrate(
        pipe,
        [job.prompt for job in jobs],
        target_speedup=arguments.target_speedup,
        target_psnr=arguments.target_psnr,
        seed=arguments.seed,
        **options,
    )
    config.to_json(arguments.output)
    print(f"{len(jobs)} images at every tolerance, {arguments.steps} steps, against the uncached ones:\n{config.calibration}")
    print(f"chosen: tolerance {config.tolerance:.4g}, written to {arguments.output}")
    print(f"draw with it: afcache generate --config {shlex.quote(str(arguments.output))} ..., or CacheConfig.from_json(...)")


def _make_folder(output: Path) -> Path:
    """Make the folder to write to before minutes are spent on what to write."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {str(output)!r} must be a folder or a place for one: {error.strerror}.") from error
    return output


def _settings(arguments: argparse.Namespace) -> CacheConfig:
    if arguments.config is not None:
        try:
            return CacheConfig.from_json(arguments.config)
        except OSError as error:
            raise ValueError(f"--config {str(arguments.config)!r} must be a file of settings: {error.strerror}.") from error
    named = None if arguments.policy is None else policy(arguments.policy)
    return resolve_config(named, tolerance=arguments.tolerance, preset=arguments.preset)


def _draw_all(draw: Draw, jobs: list[Job], *, compiles: bool, is_cached: bool, output: Path | None) -> None:
    """Draw every job once, and write its picture and report."""
    for job in jobs:
        image, seconds = timed(draw, job)
        if output is None:
            continue
        save(output / f"{job.stem}.png", image)
        print(f"{job.stem}.png in {seconds:.1f} s" + (" (the first image compiles)" if compiles and job is jobs[0] else ""))
        if is_cached:
            write_report(report(draw.pipe), output, job)
    if is_cached and output is not None:
        print(report(draw.pipe))


def _jobs(arguments: argparse.Namespace) -> list[Job]:
    """Every prompt with the same seeds; the default prompts with one seed each, to show different pictures."""
    seeds = [arguments.seed + i for i in range(arguments.num_images)]
    if arguments.prompt:
        pairs = [(prompt, seed) for prompt in arguments.prompt for seed in seeds]
    else:
        pairs = [(prompt, seed + i) for i, prompt in enumerate(_MINI_PROMPTS) for seed in seeds]
    stems: list[str] = []
    for prompt, seed in pairs:
        words = "".join(letter if letter.isalnum() else "_" for letter in prompt.lower())[:40].strip("_")
        stem = f"{words}_seed{seed}"
        # Long prompts may begin alike; no picture overwrites another.
        stems.append(stem if stem not in stems else f"{stem}_{len(stems)}")
    return [Job(prompt, seed, stem) for (prompt, seed), stem in zip(pairs, stems, strict=True)]


def missing_compiler(device: torch.device) -> str | None:
    """The reason why torch.compile cannot work here, or None. On a CPU inductor needs a C++ compiler."""
    name = (shlex.split(os.environ.get("CXX", "")) or ["g++"])[0]
    if device.type != "cpu" or shutil.which(name):
        return None
    return (
        f"no C++ compiler: {name!r} is not on the PATH, and torch.compile needs one. Install g++, set CXX, or use --no-compile."
    )


def _announce(pipe: FluxPipeline, parallel: ParallelConfig | None, compiles: bool, device: torch.device) -> None:
    if parallel is not None:
        print(processes.describe(parallel))
    if not compiles:
        return
    seconds = _COMPILE_SECONDS_PER_BLOCK.get(device.type, 2.0) * sizes(pipe.transformer).num_blocks
    print(f"compiling, about {seconds:.0f} s (once per process; --no-compile starts at once)", flush=True)


def _check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.compare and arguments.no_cache:
        raise ValueError("--compare needs the cache; leave out --no-cache.")
    if arguments.no_cache and processes.count() > 1:
        raise ValueError("--no-cache would compute everything in every process; --policy none shares the work.")
    _check_drawing(arguments)


def _check_drawing(arguments: argparse.Namespace) -> None:
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


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is not a device; try cpu, cuda or cuda:0.") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name!r} is not supported; use cpu or cuda.")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise ValueError(
            f"--device {name!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices. Use --device cpu."
        )
    return device


def _resolve_model(model: str | None) -> str:
    """A folder or hub id that names a FluxPipeline."""
    if model is None:
        return str(mini_flux_folder())
    is_hub_id = model.count("/") == 1 and not model.startswith((".", "/", "~")) and not os.path.exists(model)
    if not is_hub_id and not os.path.isdir(model):
        raise ValueError(f"--model {model!r}: no such folder (a hub id looks like black-forest-labs/FLUX.1-dev).")
    if not is_hub_id and not (Path(model) / "model_index.json").is_file():
        raise ValueError(f"--model {model!r} has no model_index.json: it is not a diffusers pipeline folder.")
    try:
        config = DiffusionPipeline.load_config(model)
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"--model {model!r} could not be loaded from the Hugging Face hub: {first}") from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name != "FluxPipeline":
        raise ValueError(f"--model {model!r} is a {name}, not a FluxPipeline; afcache knows FLUX.1 only.")
    return model


def _load(folder: str, arguments: argparse.Namespace, device: torch.device) -> FluxPipeline:
    is_mini = folder == str(mini_flux_folder())
    default = "bfloat16" if device.type == "cuda" and not is_mini else "float32"
    dtype = getattr(torch, arguments.dtype or default)
    pipe = FluxPipeline.from_pretrained(folder, dtype=dtype).to(device)
    pipe.set_progress_bar_config(desc="denoising", leave=False)
    return pipe


def _share_out(
    arguments: argparse.Namespace, folder: str, options: dict[str, Any], device: torch.device
) -> ParallelConfig | None:
    return processes.share_out(
        ulysses=arguments.ulysses,
        ring=arguments.ring,
        cfg=arguments.cfg_parallel,
        heads=_part(FluxTransformer2DModel, folder, "transformer")["num_attention_heads"],
        is_guided="true_cfg_scale" in options,
        device=device,
    )


def _part(kind: Any, folder: str, name: str) -> dict[str, Any]:
    """The configuration of a part of the pipeline, read without its weights."""
    return kind.load_config(folder, subfolder=name)


def _sampling_options(folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the pipeline is called with; known, and refused, before any weight is loaded."""
    recommended = recommended_settings(Path(folder))
    options: dict[str, Any] = {"num_inference_steps": arguments.steps}
    # Every block of the VAE but the first halves the picture, and a latent token is 2 x 2.
    multiple = 2 ** len(_part(AutoencoderKL, folder, "vae")["block_out_channels"])
    for name in ("height", "width"):
        value = getattr(arguments, name) or recommended.get(name)
        if value is not None and value % multiple:
            raise ValueError(f"--{name} must be a multiple of {multiple} for this model, got {value}.")
        if value is not None:
            options[name] = value
    length = arguments.max_sequence_length or recommended.get("max_sequence_length")
    if length is not None:
        options["max_sequence_length"] = length
    scale = arguments.true_cfg_scale or recommended.get("true_cfg_scale", 1.0)
    if scale > 1:
        options.update(true_cfg_scale=scale, negative_prompt=arguments.negative_prompt or "")
    if arguments.guidance_scale is not None:
        if not _part(FluxTransformer2DModel, folder, "transformer").get("guidance_embeds"):
            raise ValueError("--guidance-scale: this model has no guidance embedding; use --true-cfg-scale.")
        options["guidance_scale"] = arguments.guidance_scale
    return options
