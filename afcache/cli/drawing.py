"""Drawing jobs, writing pictures, videos and reports, and telling of them."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afcache.cli.jobs import Job
from afcache.cli.pictures import Drawn, clear, has_encoder, save
from afcache.reports.records import report
from afcache.reports.summary import Report


class Draw:
    """Calls the pipeline for a job.

    Args:
        pipe: any pipeline that draws from text.
        options: of its call.
        rate: frames per second of what it draws, if that is a video.

    """

    def __init__(self, pipe: Any, options: dict[str, Any], rate: float = 1.0) -> None:
        self.pipe = pipe
        self.options = options
        self.rate = rate

    def __call__(self, job: Job) -> Drawn:
        """Draw with the job's seed."""
        generator = torch.Generator().manual_seed(job.seed)
        output: Any = self.pipe(prompt=job.prompt, generator=generator, output_type="np", **self.options)
        # The first field, whatever it is called; of the batch the only one.
        pixels, audio = np.asarray(output[0][0]), getattr(output, "audio", None)
        if audio is None:
            return Drawn(pixels, self.rate)
        sound = torch.as_tensor(audio[0]).float().cpu().numpy().T
        return Drawn(pixels, self.rate, sound, self.pipe.vocoder.config.output_sampling_rate)


def timed(draw: Draw, job: Job) -> tuple[Drawn, float]:
    """Draw; return what was drawn and the seconds it took."""
    began = time.perf_counter()
    drawn = draw(job)
    return drawn, time.perf_counter() - began


def draw_all(draw: Draw, jobs: list[Job], *, compiles: bool, is_cached: bool, output: Path | None) -> None:
    """Draw every job once, and write it and its report.

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
        drawn, seconds = timed(draw, job)
        if output is None:
            continue
        clear(output / job.stem)
        save(output / job.stem, drawn)
        line = f"{job.stem}{drawn.file} in {seconds:.1f} s"
        if is_cached:
            reports.append(report(draw.pipe))
            write_report(reports[-1], output, job)
        if is_cached and len(jobs) > 1:
            line += f"   {reports[-1].pattern()}   {reports[-1].block_speedup:.2f}x fewer block evaluations"
        print(line + ("   (the first image compiles)" if compiles and job is jobs[0] else ""), flush=True)
        if job is jobs[-1]:
            say_what_is_missing(drawn)
    if len(reports) == 1:
        print(reports[0])
    elif reports:
        print(summarise(reports))


def say_what_is_missing(drawn: Drawn) -> None:
    """One line where a video could not be written as MP4."""
    if drawn.is_video and not has_encoder():
        print("no MP4 was written beside the GIF: that needs an encoder, pip install imageio-ffmpeg")


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


def write_report(result: Report, output: Path, job: Job) -> None:
    """Write a job's report as JSON and as a plot."""
    result.to_json(output / f"{job.stem}.json")
    result.plot(output / f"{job.stem}_report.png")
