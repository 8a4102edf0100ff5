"""`afcache calibrate`: draw until the settings for a speed or a quality are found."""

import argparse
import shlex

from afcache.cli import processes
from afcache.cli.interrupt import raise_from_now_on
from afcache.cli.jobs import make_jobs
from afcache.cli.loading import load_pipeline
from afcache.cli.model import resolve_model
from afcache.cli.options import call_options, check_drawing, check_sizes, makes_video
from afcache.cli.silence import quiet_imports
from afcache.settings.curve import check_targets


def run(arguments: argparse.Namespace) -> None:
    """Find settings for what the command line asks, print the curve and write them.

    Raises:
        ValueError, NotImplementedError, OSError: anything a user can mend; the message says how.

    """
    check_targets(arguments.target_speedup, arguments.target_psnr)
    check_drawing(arguments)
    if processes.count() > 1:
        raise ValueError("calibrate runs in one process; start it without torchrun. What it finds holds for several, too.")
    if arguments.output.is_dir() or not arguments.output.parent.is_dir():
        raise ValueError(f"--output must be a file in a folder that exists, got {str(arguments.output)!r}.")
    jobs = make_jobs(arguments)
    model = resolve_model(arguments.model)
    check_sizes(model, arguments)
    # Importing torch takes a second, and diffusers, below, several.
    from afcache.cli.device import choose_device

    device = choose_device(arguments.device)
    with quiet_imports():
        from afcache.calibration.tolerance import calibrate
        from afcache.cli.outline import check_cached, check_text_alone, outline

    found = outline(model)
    check_text_alone(found)
    options = call_options(model, found.call, arguments, embeds_guidance=found.embeds_guidance)
    check_cached(found, compile=False)
    pipe = load_pipeline(found, arguments, device)
    raise_from_now_on()
    config = calibrate(
        pipe,
        [job.prompt for job in jobs],
        target_speedup=arguments.target_speedup,
        target_psnr=arguments.target_psnr,
        seed=arguments.seed,
        **options,
    )
    config.to_json(arguments.output)
    noun = "videos" if makes_video(found.call) else "images"
    print(f"{len(jobs)} {noun} at every tolerance, {arguments.steps} steps, against the uncached ones:\n{config.calibration}")
    print(f"chosen: tolerance {config.tolerance:.4g}, written to {arguments.output}")
    print(f"draw with it: afcache generate --config {shlex.quote(str(arguments.output))} ..., or CacheConfig.from_json(...)")
