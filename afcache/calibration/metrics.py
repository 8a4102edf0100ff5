"""Image quality against a reference, in float64."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from skimage.metrics import structural_similarity

# Sides in pixels of what structural similarity looks at.
_SMALLEST_WINDOW, _WINDOW = 3, 7


def as_unit_range(image: ArrayLike) -> np.ndarray:
    """uint8 pictures become [0, 1]; floating ones are taken as [0, 1] already. Always float64: uint8 differences wrap."""
    array = np.asarray(image)
    return array.astype(np.float64) / 255 if array.dtype == np.uint8 else array.astype(np.float64)


def psnr(image: ArrayLike, reference: ArrayLike) -> float:
    """Peak signal-to-noise ratio in dB, peak 1: -10 log10(mean squared difference).

    Args:
        image, reference: equal shapes; uint8 in 0 to 255 (PIL pictures too), or floating in [0, 1].

    Returns:
        dB; infinity for equal images. Unrelated images score under 12 dB.

    Raises:
        ValueError: the shapes differ.

    """
    first, second = as_unit_range(image), as_unit_range(reference)
    if first.shape != second.shape:
        raise ValueError(f"image has shape {first.shape}, reference {second.shape}; compare pictures of one size.")
    mse = float(np.mean((first - second) ** 2))
    return math.inf if mse == 0 else -10 * math.log10(mse)


def ssim(image: ArrayLike, reference: ArrayLike) -> float:
    """Structural similarity of two colour pictures `[height, width, 3]`; 1 for equal ones.

    Raises:
        ValueError: the shapes differ, or a side is shorter than 3 pixels.
    Reference:
        Wang et al., 2004, "Image quality assessment"; scikit-image's implementation, per channel, in windows of 7 x 7
        pixels, or of the largest odd side that a smaller picture holds.

    """
    first, second = as_unit_range(image), as_unit_range(reference)
    if first.shape != second.shape:
        raise ValueError(f"image has shape {first.shape}, reference {second.shape}; compare pictures of one size.")
    shortest = min(first.shape[:2])
    if shortest < _SMALLEST_WINDOW:
        raise ValueError(f"image must be {_SMALLEST_WINDOW} pixels or more on each side to have structure, got {first.shape}.")
    window = min(_WINDOW, shortest - 1 + shortest % 2)
    value: Any = structural_similarity(first, second, channel_axis=-1, data_range=1.0, win_size=window)
    return float(value)
