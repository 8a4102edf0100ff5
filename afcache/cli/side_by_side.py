"""Uncached, cached and their difference side by side: pictures as one, videos as a strip of frames and as a GIF."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from afcache.calibration.clips import ClipQuality, clip_quality
from afcache.calibration.metrics import psnr, ssim
from afcache.cli.jobs import Job
from afcache.cli.pictures import Drawn, as_image, beside, save_film, strip
from afcache.reports.summary import Report

# Of a difference; larger ones would show what rounding alone does.
_FACTORS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_MOST_PICTURES, _MOST_VIDEOS = 8, 3
# Of one of the three panels of a GIF, in pixels: what a title needs, and what a screen has.
_NARROWEST, _WIDEST, _TITLE = 240, 416, 16


@dataclass(frozen=True)
class Comparison:
    """Cached against uncached, same prompt and seed."""

    job: Job
    uncached: Drawn
    cached: Drawn
    report: Report

    @cached_property
    def psnr(self) -> float:
        """In dB, of all frames together."""
        return psnr(self.cached.pixels, self.uncached.pixels)

    @cached_property
    def ssim(self) -> float:
        """1 means equal; the mean over all frames."""
        pairs = zip(self.cached.frames, self.uncached.frames, strict=True)
        return float(np.mean([ssim(*pair) for pair in pairs]))

    @cached_property
    def clip(self) -> ClipQuality | None:
        """Of a video of two frames or more."""
        is_clip = self.cached.is_video and len(self.cached.frames) > 1
        return clip_quality(self.cached.frames, self.uncached.frames) if is_clip else None

    @cached_property
    def panels(self) -> tuple[tuple[np.ndarray, str], ...]:
        """Three times pixels `[frames, height, width, 3]` and a title; the difference is amplified as its title says."""
        difference = np.abs(self.cached.frames.astype(np.float64) - self.uncached.frames)
        gain = amplification(difference)
        return (
            (self.uncached.frames, f"uncached: {self.job.line}"),
            (self.cached.frames, f"cached, {self.report.block_speedup:.2f}x fewer blocks, {self.psnr:.1f} dB"),
            (np.clip(difference * gain, 0, 1), difference_title(difference, gain)),
        )


def show_side_by_side(results: list[Comparison], output: Path) -> Path:
    """Write compare.png and, of videos, compare.gif; return what shows most."""
    picture = output / "compare.png"
    if not results[0].cached.is_video:
        _draw_pictures(results[:_MOST_PICTURES], picture)
        return picture
    _draw_frames(results[:_MOST_VIDEOS], picture)
    film = output / "compare.gif"
    rows = [_film(result) for result in results[:_MOST_VIDEOS]]
    save_film(film, np.concatenate(rows, axis=1), results[0].cached.rate)
    return film


def _draw_pictures(results: list[Comparison], path: Path) -> None:
    """One row per image."""
    figure = _figure(8.4, 2.9 * len(results))
    grid = figure.subplots(len(results), 3, squeeze=False)
    for axes, result in zip(grid, results, strict=True):
        for axis, (frames, title) in zip(axes, result.panels, strict=True):
            axis.imshow(frames[0], interpolation="nearest")
            axis.set_title(title, fontsize=8, parse_math=False)
            axis.set_axis_off()
    figure.savefig(path, dpi=110)


def _draw_frames(results: list[Comparison], path: Path) -> None:
    """Three rows per video, with some of its frames from left to right."""
    strips = [(strip(frames), title) for one in results for frames, title in one.panels]
    height, width = strips[0][0].shape[:2]
    figure = _figure(12.0, (12.0 * height / width + 0.3) * len(strips))
    grid = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axis, (picture, title) in zip(grid, strips, strict=True):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(title, fontsize=8, loc="left", parse_math=False)
        axis.set_axis_off()
    figure.savefig(path, dpi=110)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _film(result: Comparison) -> np.ndarray:
    """The three panels of a video with their titles, `[frames, height, width, 3]`."""
    height, width = result.cached.frames.shape[1:3]
    wide = min(max(width, _NARROWEST), _WIDEST)
    size, how = (wide, round(height * wide / width)), Image.Resampling.NEAREST if wide > width else Image.Resampling.BICUBIC
    return beside(*(_panel(frames, title, size, how) for frames, title in result.panels))


def _panel(frames: np.ndarray, title: str, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    header = Image.new("RGB", (size[0], _TITLE), "white")
    ImageDraw.Draw(header).text((3, 2), title, fill="black")
    resized = (np.asarray(as_image(frame).resize(size, how)) for frame in frames)
    return np.stack([np.concatenate([np.asarray(header), frame]) / 255 for frame in resized])


def amplification(difference: np.ndarray) -> int:
    """The factor that makes a difference visible: of 1, 2, 5, 10, ... the largest that keeps 99 % of it below white.

    Args:
        difference: absolute, of pixels in [0, 1].

    """
    bright = float(np.quantile(difference, 0.99))
    fitting = [factor for factor in _FACTORS if factor * bright <= 1.0]
    return fitting[-1] if fitting else 1


def difference_title(difference: np.ndarray, gain: int) -> str:
    """What the third picture shows."""
    if not difference.any():
        return "no difference"
    return f"their difference x {gain} (mean {difference.mean():.5f})"
