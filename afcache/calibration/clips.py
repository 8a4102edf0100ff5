"""Quality of a video against a reference: frame by frame, as a whole, and in time; in float64."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from afcache.calibration.metrics import as_unit_range, psnr, ssim


class ClipQuality(NamedTuple):
    """How near a clip y is to its reference x, e = y - x.

    Attributes:
        psnr: in dB, of all frames together.
        frames: in dB, of every frame.
        ssim: mean over the frames; 1 for equal ones.
        flicker: ||e_{t+1} - e_t|| / ||x_{t+1} - x_t||: what changes from frame to frame and should not, relative to what moves;
            infinite where nothing does.
        unsteadiness: ||e_{t+1} - e_t|| / (sqrt(2) ||e_t||), over all pairs of neighbours: 0 where every frame is off by the
            same, 1 where each is by itself; 0 where none is off.

    """

    psnr: float
    frames: tuple[float, ...]
    ssim: float
    flicker: float
    unsteadiness: float

    @property
    def worst_frame(self) -> float:
        """PSNR of the worst frame, in dB; NaN where a frame is not finite."""
        return float(np.min(self.frames))


def clip_quality(clip: ArrayLike, reference: ArrayLike) -> ClipQuality:
    """Measure a clip.

    Args:
        clip, reference: `[frames, height, width, 3]`, two frames or more; uint8, or floating in [0, 1].

    Raises:
        ValueError: the shapes differ, or are no video's, or a side is shorter than 3 pixels.

    """
    y, x = as_unit_range(clip), as_unit_range(reference)
    if y.shape != x.shape:
        raise ValueError(f"clip has shape {y.shape}, reference {x.shape}; compare clips of one size and length.")
    if y.ndim != 4 or len(y) < 2:
        raise ValueError(f"clip must be [frames, height, width, 3] with two frames or more, got {y.shape}.")
    error = y - x
    changed, moved = _norm(np.diff(error, axis=0)), _norm(np.diff(x, axis=0))
    # Every error but the first and the last is in two pairs.
    off = math.hypot(_norm(error[1:]), _norm(error[:-1]))
    return ClipQuality(
        psnr=psnr(y, x),
        frames=tuple(psnr(*pair) for pair in zip(y, x, strict=True)),
        ssim=float(np.mean([ssim(*pair) for pair in zip(y, x, strict=True)])),
        flicker=_ratio(changed, moved),
        unsteadiness=_ratio(changed, off),
    )


def _norm(values: np.ndarray) -> float:
    return float(np.sqrt(np.sum(values**2)))


def _ratio(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return math.inf if whole == 0 else part / whole
