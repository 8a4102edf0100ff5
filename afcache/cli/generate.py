"""`afcache generate`: everything that can be wrong is found out, then the pipeline is loaded, and draws."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afcache.cli import processes
from afcache.cli.interrupt import raise_from_now_on
from afcache.cli.jobs import make_jobs
from afcache.cli.loading import load_pipeline
from afcache.cli.model import resolve_model
from afcache.cli.options import call_options, check_drawing, check_sizes, frames_per_second
from afcache.cli.silence import quiet_imports
from afcache.settings.config import CacheConfig
from afcache.settings.policies import policy
from afcache.settings.presets import resolve_config

if TYPE_CHECKING:
    from afcache.cli.outline import Outline

_COMPILE_SECONDS_PER_BLOCK = {"cpu": 5.0, "cuda": 1.5}


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks.

    Raises:
        ValueError, NotImplementedError, OSError: anything a user can mend; the message says how.

    """
    _check_arguments(arguments)
    settings = _settings(arguments)
    resolve_config(**settings)
    jobs = make_jobs(arguments)
    model = resolve_model(arguments.model)
    check_sizes(model, arguments)
    # Importing torch takes a second, and diffusers, below, several.
    from afcache.cli.device import choose_device, missing_compiler

    device = processes.own_device(arguments.device, choose_device(arguments.device))
    compiles = not (arguments.no_compile or arguments.no_cache)
    if compiles and (problem := missing_compiler(device)):
        raise OSError(problem)
    with quiet_imports():
        from afcache.cli.comparison import compare
        from afcache.cli.drawing import Draw, draw_all
        from afcache.cli.outline import check_cached, check_text_alone, outline
        from afcache.pipeline import compile_pipeline

    found = outline(model)
    check_text_alone(found)
    options = call_options(model, found.call, arguments, embeds_guidance=found.embeds_guidance)
    if not arguments.no_cache:
        check_cached(found, **settings, compile=compiles)
    parallel = processes.choose_degrees(
        ulysses=arguments.ulysses,
        ring=arguments.ring,
        cfg=arguments.cfg_parallel,
        heads=found.shared_heads,
        is_guided=options.get("true_cfg_scale", 1) > 1,
        device=device,
    )
    # Processes other than the first draw along; they print and write nothing.
    output = _make_folder(arguments.output) if processes.is_first() else None
    pipe = load_pipeline(found, arguments, device)
    raise_from_now_on()
    draw = Draw(pipe, options, frames_per_second(found.call, arguments.fps))
    if not arguments.no_cache:
        compile_pipeline(pipe, **settings, compile=compiles, parallel=parallel)
    if output is None:
        pipe.set_progress_bar_config(disable=True)
    else:
        if parallel is not None:
            print(processes.describe(parallel))
        _announce(found, device.type, compiles=compiles)
    if arguments.compare:
        compare(draw, jobs, settings, compiles=compiles, output=output, parallel=parallel)
    else:
        draw_all(draw, jobs, compiles=compiles, is_cached=not arguments.no_cache, output=output)
    if output is not None:
        print(f"written to {output}/")
    processes.part()


def _check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.compare and arguments.no_cache:
        raise ValueError("--compare needs the cache; leave out --no-cache.")
    if arguments.no_cache and processes.count() > 1:
        raise ValueError("--no-cache would compute everything in every process; --policy none shares the work.")
    check_drawing(arguments)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, as `compile_pipeline` takes it."""
    config = None if arguments.policy is None else policy(arguments.policy)
    if arguments.config is not None:
        try:
            config = CacheConfig.from_json(arguments.config)
        except OSError as error:
            raise ValueError(f"--config {str(arguments.config)!r} must be a file of settings: {error.strerror}.") from error
    return {"config": config, "tolerance": arguments.tolerance, "preset": arguments.preset}


def _make_folder(output: Path) -> Path:
    """Make the folder to write to before minutes are spent on what to write."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {str(output)!r} must be a folder or a place for one: {error.strerror}.") from error
    return output


def _announce(found: "Outline", device: str, *, compiles: bool) -> None:
    if not compiles:
        return
    seconds = _COMPILE_SECONDS_PER_BLOCK.get(device, 2.0) * found.num_blocks
    length = "the blocks that repeat" if found.is_called else f"about {seconds:.0f} s"
    print(f"compiling, {length} (once per process; --no-compile starts at once)", flush=True)
