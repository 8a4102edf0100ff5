"""Pictures of a report."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CHOICES = ("computed", "taylor", "similarity", "attention", "difference")
_COLORS = ("#1f77b4", "#e8e8e8", "#b5d8a8", "#f3c77b", "#e39a9a")


def draw_report(report: Any, path: str | Path) -> None:
    """Draw a report that is not empty: errors over the steps; with groups also heat maps of choices and of stability.

    Args:
        report: an `afcache.Report`; its first sample and its leading guidance branch are shown in the heat maps.
        path: of the picture.

    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    leader = [step for step in report.steps if step.branch == 0]
    groups = len(leader[0].groups)
    height = 0.9 + 0.22 * groups
    ratios = [3.5, height, height] if groups else [3.5]
    figure = Figure(figsize=(8, sum(ratios)), layout="constrained")
    FigureCanvasAgg(figure)
    axes, *maps = figure.subplots(len(ratios), 1, squeeze=False, height_ratios=ratios)[:, 0]
    _draw_errors(axes, report, leader)
    if maps:
        _draw_choices(figure, maps[0], leader)
        _draw_stability(figure, maps[1], leader)
    figure.savefig(path, dpi=120)


def _draw_errors(axes: Any, report: Any, leader: list[Any]) -> None:
    for step in leader:
        if step.is_computed:
            axes.axvspan(step.step - 0.5, step.step + 0.5, color="tab:blue", alpha=0.15, linewidth=0)
    x = [step.step for step in leader]
    estimated, measured = ([worst(getattr(step, name)) for step in leader] for name in ("estimated_error", "measured_error"))
    axes.plot(x, estimated, drawstyle="steps-mid", label="estimated, accumulated")
    axes.plot(x, measured, "o", label="measured at a refresh (relative)")
    tolerance = report.config["tolerance"] if report.config["policy"] == "adaptive" else 0.0
    if tolerance > 0:
        axes.axhline(tolerance, color="tab:red", linestyle="--", linewidth=1, label="tolerance")
    axes.set_yscale("symlog", linthresh=1e-3)
    largest = [*measured, tolerance]
    axes.set_ylim(0, 2 * max(value for value in largest if math.isfinite(value)) or 1.0)
    axes.set_xlim(x[0] - 0.5, x[-1] + 0.5)
    axes.set_xlabel("step (shaded: computed in full)")
    axes.set_ylabel("error of the velocity")
    axes.set_title(f"{report.pattern()}   {report.block_speedup:.2f}x fewer block evaluations", fontsize=9, family="monospace")
    axes.legend(fontsize=8)


def _draw_choices(figure: Any, axes: Any, leader: list[Any]) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    values = [[_CHOICES.index(step.groups[group].choice[0]) for step in leader] for group in range(len(leader[0].groups))]
    colors = ListedColormap(list(_COLORS))
    image = _draw_map(axes, values, leader, cmap=colors, norm=BoundaryNorm([i - 0.5 for i in range(6)], 5))
    bar = figure.colorbar(image, ax=axes, ticks=range(5), fraction=0.08)
    bar.ax.set_yticklabels(_CHOICES, fontsize=6)
    axes.set_title("what each group of blocks did", fontsize=8)


def _draw_stability(figure: Any, axes: Any, leader: list[Any]) -> None:
    values = [[step.groups[group].stability[0] for step in leader] for group in range(len(leader[0].groups))]
    image = _draw_map(
        axes, values, leader, cmap="viridis", vmax=1.0, vmin=min(0.9, *(min(row[1:], default=0.9) for row in values))
    )
    figure.colorbar(image, ax=axes, fraction=0.08).ax.tick_params(labelsize=6)
    axes.set_title("stability", fontsize=8)
    axes.set_xlabel("step")


def _draw_map(axes: Any, values: Sequence[Sequence[float]], leader: list[Any], **options: Any) -> Any:
    extent = (leader[0].step - 0.5, leader[-1].step + 0.5, len(values) - 0.5, -0.5)
    axes.set_ylabel("group")
    axes.set_yticks(range(len(values)))
    axes.tick_params(labelsize=7)
    return axes.imshow(values, aspect="auto", interpolation="nearest", extent=extent, **options)


def worst(values: tuple[float, ...]) -> float:
    """The largest finite value; NaN if there is none."""
    return max((value for value in values if math.isfinite(value)), default=math.nan)
