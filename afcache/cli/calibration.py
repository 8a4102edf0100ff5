"""`afcache calibrate`: draw until the settings for a speed or a quality are found."""

import argparse
import shlex

from afcache.cli import processes
from afcache.cli.interrupt import raise_from_now_on
from afcache.cli.loading import load_pipeline
from afcache.cli.model import check_drawing, make_jobs, resolve_model, sampling_options
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
    options = sampling_options(model, arguments)
    # Importing torch takes a second, and diffusers, below, several.
    from afcache.cli.device import choose_device

    pipe = load_pipeline(model, arguments, choose_device(arguments.device))
    with quiet_imports():
        from afcache.calibration.tolerance import calibrate

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
    print(f"{len(jobs)} images at every tolerance, {arguments.steps} steps, against the uncached ones:\n{config.calibration}")
    print(f"chosen: tolerance {config.tolerance:.4g}, written to {arguments.output}")
    print(f"draw with it: afcache generate --config {shlex.quote(str(arguments.output))} ..., or CacheConfig.from_json(...)")
