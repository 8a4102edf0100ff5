"""Drawing jobs, writing pictures and reports, and telling of them."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from afcache.cli.model import Job
from afcache.reports.records import report
from afcache.reports.summary import Report


class Draw:
    """Calls the pipeline for a job; returns float pixels `[height, width, 3]` in [0, 1]."""

    def __init__(self, pipe: FluxPipeline, options: dict[str, Any]) -> None:
        self.pipe = pipe
        self.options = options

    def __call__(self, job: Job) -> np.ndarray:
        """Draw one image with the job's seed."""
        generator = torch.Generator().manual_seed(job.seed)
        output: Any = self.pipe(prompt=job.prompt, generator=generator, output_type="np", **self.options)
        return output.images[0]


def timed(draw: Draw, job: Job) -> tuple[np.ndarray, float]:
    """Draw; return the image and the seconds it took."""
    began = time.perf_counter()
    image = draw(job)
    return image, time.perf_counter() - began


def draw_all(draw: Draw, jobs: list[Job], *, compiles: bool, is_cached: bool, output: Path | None) -> None:
    """Draw every job once, and write its picture and report.

    One image's report is printed whole; of several a line for each, and what they come to together.

    Args:
        draw: calls the pipeline.
        jobs: what to draw.
        compiles: whether the first image compiles.
        is_cached: whether there is a report.
        output: where to write; None on ranks that draw along, and print nothing either.

    """
    reports: list[Report] = []
    for job in jobs:
        image, seconds = timed(draw, job)
        if output is None:
            continue
        clear(output, job)
        save(output / f"{job.stem}.png", image)
        line = f"{job.stem}.png in {seconds:.1f} s"
        if is_cached:
            reports.append(report(draw.pipe))
            write_report(reports[-1], output, job)
        if is_cached and len(jobs) > 1:
            line += f"   {reports[-1].pattern()}   {reports[-1].block_speedup:.2f}x fewer block evaluations"
        print(line + ("   (the first image compiles)" if compiles and job is jobs[0] else ""), flush=True)
    if len(reports) == 1:
        print(reports[0])
    elif reports:
        print(summarise(reports))


def summarise(reports: list[Report]) -> str:
    """What several images come to together."""
    ran, whole = count_evaluations(reports)
    speeds = [one.block_speedup for one in reports]
    return (
        f"{len(reports)} images: {ran} of {whole} block evaluations ran, {whole / ran:.2f}x fewer "
        f"({min(speeds):.2f}x to {max(speeds):.2f}x)\n"
        "F computed, . forecast; the whole report of each image is in its .json and its _report.png"
    )


def count_evaluations(reports: list[Report]) -> tuple[int, int]:
    """Block evaluations that ran, MLPs alone counted as a whole block, and those of the same images without a cache."""
    ran = sum(one.block_evaluations + one.mlp_evaluations for one in reports)
    return ran, sum(one.block_evaluations_uncached for one in reports)


def clear(output: Path, job: Job) -> None:
    """Remove what an earlier run has left under a job's name: files of one name belong together."""
    for ending in (".png", "_uncached.png", ".json", "_report.png"):
        (output / f"{job.stem}{ending}").unlink(missing_ok=True)


def save(path: Path, image: np.ndarray) -> None:
    """Write float pixels in [0, 1] as a picture file."""
    Image.fromarray((image * 255).round().astype(np.uint8)).save(path)


def write_report(result: Report, output: Path, job: Job) -> None:
    """Write a job's report as JSON and as a plot."""
    result.to_json(output / f"{job.stem}.json")
    result.plot(output / f"{job.stem}_report.png")
