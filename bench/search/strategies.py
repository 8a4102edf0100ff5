"""Curves of speed against quality by policy: their tables, the founding claim, and their picture."""

from pathlib import Path
from typing import Any, NamedTuple

from bench.record.figure import new_figure
from bench.search.curves import Point, speed_at, worst_at
from bench.search.families import Family
from bench.search.setting import Setting

QUALITIES = (45, 40, 35, 30)


class Curve(NamedTuple):
    """A family's points in one setting, slowest first.

    Speed counts operations in the blocks: the same as block evaluations where blocks run whole, and fair to what reuses
    attention outputs alone.
    """

    setting: Setting
    family: Family
    points: list[Point]


def interpolated(curves: list[Curve]) -> list[dict[str, Any]]:
    """One row for each family and setting: its speed at each quality; empty where the curve does not reach it."""
    return [
        {
            "setting": str(curve.setting),
            "policy": curve.family.name,
            **{f"speed at {quality} dB": _speed(curve.points, quality) for quality in QUALITIES},
            "worst at 40 dB": worst_at(curve.points, speed_at(curve.points, 40)) if _reaches(curve.points, 40) else "-",
        }
        for curve in curves
    ]


def _reaches(points: list[Point], quality: float) -> bool:
    return points[0].mean >= quality


def _speed(points: list[Point], quality: float) -> float | str:
    """Interpolated; "-" where even the slowest point is worse, "> x" where even the fastest is better."""
    if not _reaches(points, quality):
        return "-"
    speed = speed_at(points, quality)
    return f"> {speed:.2f}" if points[-1].mean > quality else speed


def claim(curves: list[Curve]) -> list[dict[str, Any]]:
    """The founding claim, row by row: the default against the best single strategy, without and with our correction."""
    rows = []
    for setting in dict.fromkeys(curve.setting for curve in curves):
        for quality in (40, 35):
            here = [curve for curve in curves if curve.setting == setting]
            ours = next(curve for curve in here if curve.family.name == "AFCache, default")
            best = {kind: _best(here, kind, quality) for kind in ("single", "corrected")}
            speed = speed_at(ours.points, quality)
            rows.append(
                {
                    "setting": str(setting),
                    "PSNR (dB)": quality,
                    "adaptive default": speed,
                    "best single strategy": best["single"][0],
                    "which": best["single"][1],
                    "ratio (claim: 1.2)": speed / best["single"][0],
                    "best with our correction": best["corrected"][0],
                    "which one": best["corrected"][1],
                    "ratio (claim: 1)": speed / best["corrected"][0],
                }
            )
    return rows


def _best(curves: list[Curve], kind: str, quality: float) -> tuple[float, str]:
    reached = [(speed_at(c.points, quality), c) for c in curves if c.family.kind == kind]
    speed, curve = max(reached, key=lambda pair: pair[0])
    ends_above = curve.points[-1].mean > quality
    return speed, curve.family.name + (" (its fastest)" if ends_above else "")


def points_table(curves: list[Curve]) -> list[dict[str, Any]]:
    """Every point on every curve."""
    return [
        {
            "setting": str(curve.setting),
            "policy": curve.family.name,
            "fewer operations": point.speed,
            "fewer block evaluations": point.blocks,
            "PSNR mean": point.mean,
            "10th percentile": point.tenth,
            "worst": point.worst,
            "SSIM": point.ssim,
            "accuracy": point.accuracy,
        }
        for curve in curves
        for point in curve.points
    ]


def draw_curves(curves: list[Curve], path: Path) -> None:
    """One panel for each setting: mean PSNR against speed, ours on top."""
    from matplotlib import colormaps

    settings = list(dict.fromkeys(curve.setting for curve in curves))
    figure = new_figure(6 * min(2, len(settings)) + 2.5, 4.2 * ((len(settings) + 1) // 2))
    panels = figure.subplots((len(settings) + 1) // 2, min(2, len(settings)), squeeze=False).flat
    colors = colormaps["tab20"]
    names = list(dict.fromkeys(curve.family.name.removesuffix(" + correction") for curve in curves))
    for axes, setting in zip(panels, settings, strict=False):
        for curve in curves:
            if curve.setting != setting:
                continue
            base = curve.family.name.removesuffix(" + correction")
            is_ours = curve.family.kind == "ours"
            axes.plot(
                [point.speed for point in curve.points],
                [point.mean for point in curve.points],
                {"ours": "o-", "single": ".--", "corrected": ".-", "control": "x:"}[curve.family.kind],
                color="black" if base == "AFCache, default" else colors(names.index(base) % 20),
                linewidth=2.2 if is_ours else 1,
                markersize=4,
                label=curve.family.name,
                zorder=3 if is_ours else 2,
            )
        axes.set(title=str(setting), xlabel="times fewer operations in the blocks", ylabel="mean PSNR (dB)")
        axes.set(xlim=(1, 9), ylim=(20, 70))
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=6.5, loc="outside right center")
    figure.savefig(path, dpi=120)
