"""What `afcache.calibrate` is asked for, and what it measured: speed and quality over the tolerance, as plain data."""

import dataclasses
import math
from typing import Any

from afcache._checks import check_number

EQUAL_PSNR = 150.0  # dB, for images without a difference


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One tolerance, measured on every prompt.

    Attributes:
        tolerance: error budget between refreshes.
        speedup: how many times fewer block evaluations, over all images together.
        psnr: mean PSNR in dB against the uncached images; equal images count as 150 dB.
        worst_psnr: of the worst image, in dB.

    """

    tolerance: float
    speedup: float
    psnr: float
    worst_psnr: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """How a config was found.

    Attributes:
        target_speedup: what was asked for, or None.
        target_psnr: what was asked for in dB, or None.
        images: how many were drawn at every point.
        curve: all points, by rising tolerance.

    """

    target_speedup: float | None
    target_psnr: float | None
    images: int
    curve: tuple[CurvePoint, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Calibration":
        """Read what `dataclasses.asdict` wrote.

        Raises:
            ValueError: the values are none of a calibration.

        """
        try:
            return cls(**{**values, "curve": tuple(CurvePoint(**point) for point in values["curve"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"calibration must be what afcache.calibrate measured, got {values!r}.") from error

    def __str__(self) -> str:
        lines = [f"{'tolerance':>10}  {'fewer blocks':>12}  {'PSNR':>8}  {'worst':>8}"]
        lines += [
            f"{point.tolerance:>10.4g}  {point.speedup:>11.2f}x  {point.psnr:>5.1f} dB  {point.worst_psnr:>5.1f} dB"
            for point in self.curve
        ]
        return "\n".join(lines)


def check_targets(target_speedup: float | None, target_psnr: float | None) -> None:
    """Raise unless exactly one target is given, in its range."""
    if (target_speedup is None) == (target_psnr is None):
        raise ValueError(
            f"exactly one of target_speedup and target_psnr must be given, got {target_speedup!r} and {target_psnr!r}."
        )
    if target_speedup is not None:
        check_number("target_speedup", target_speedup, 1.0, math.inf, cure="2 halves the block evaluations")
    if target_psnr is not None:
        check_number("target_psnr", target_psnr, 0.0, EQUAL_PSNR, cure="40 dB is hard to see")
