"""Pictures of a report."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afcache.functional.groups.strategies.table import MARKS
from afcache.reports.values import allowed, worst
from afcache.settings.rules import RULES

_CHOICES = tuple(MARKS)
# Of what was computed, then of the strategies.
_COLORS = ("#1f77b4", "#e8e8e8", "#b5d8a8", "#f3c77b", "#e39a9a")


def draw_report(report: Any, path: str | Path) -> None:
    """Draw a report that is not empty: errors over the steps; with groups also heat maps of choices and of stability.

    What decides and what was measured have units of their own, and a picture each: the estimate is a relative error times a
    distance in sigma, summed over the steps since the last refresh; measured is the relative error of one forecast.

    Args:
        report: an `afcache.Report`; its first sample and its leading guidance branch are shown in the heat maps.
        path: of the picture.

    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    leader = [step for step in report.steps if step.branch == 0]
    groups = len(leader[0].groups)
    height = 0.9 + 0.22 * groups
    ratios = [2.6, 2.3, *([height, height] if groups else [])]
    figure = Figure(figsize=(8, sum(ratios)), layout="constrained")
    FigureCanvasAgg(figure)
    estimate, errors, *maps = figure.subplots(len(ratios), 1, squeeze=False, height_ratios=ratios)[:, 0]
    estimate.set_title(
        f"{report.pattern()}   {report.block_speedup:.2f}x fewer block evaluations", fontsize=9, family="monospace"
    )
    draw_estimate(estimate, report, leader)
    draw_errors(errors, leader)
    if maps:
        _draw_choices(figure, maps[0], leader)
        _draw_stability(figure, maps[1], leader)
    figure.savefig(path, dpi=120)


def draw_estimate(axes: Any, report: Any, leader: list[Any]) -> None:
    """The estimate since the last refresh, step by step, and the tolerance, which it stays below; of a batch the largest.

    Hollow is what it would have come to, had a computed step been forecast.
    """
    _shade_refreshes(axes, leader)
    setting = report.config["tolerance"] if RULES[report.config["policy"]].is_error_controlled else 0.0
    tolerance = (max(setting) if isinstance(setting, tuple) else setting) * report.tolerance_scale
    estimated, refused = [worst(step.estimated_error) for step in leader], refused_estimates(report)
    axes.set_ylabel("relative error x sigma, weighed")
    shown = [value for value in (*estimated, *refused.values()) if math.isfinite(value) and value > 0]
    if not shown:
        axes.text(0.5, 0.5, "no estimate", transform=axes.transAxes, ha="center", va="center", fontsize=9)
        return
    axes.bar([step.step for step in leader], estimated, width=0.8, color="tab:orange", label="estimate since the last refresh")
    hollow = {"facecolor": "none", "edgecolor": "tab:orange", "linestyle": ":"}
    if refused:
        axes.bar(list(refused), list(refused.values()), width=0.8, label="had the step been forecast", **hollow)
    if tolerance > 0:
        axes.axhline(tolerance, color="tab:red", linestyle="--", linewidth=1, label=f"tolerance {allowed(report)}")
    axes.set_ylim(0, 1.3 * max(tolerance, *shown))
    axes.legend(fontsize=8, loc="upper right", ncols=3)


def refused_estimates(report: Any) -> dict[int, float]:
    """By computed step: what the estimate would have come to, had it been forecast; of a batch the largest."""
    refused = {step.step: worst(step.refused_error) for step in report.steps if step.branch == 0 and step.is_computed}
    return {step: estimate for step, estimate in refused.items() if math.isfinite(estimate)}


def draw_errors(axes: Any, leader: list[Any]) -> None:
    """The relative error of each step's forecast: predicted, and measured where the step was computed after all."""
    _shade_refreshes(axes, leader)
    x = [step.step for step in leader]
    predicted, measured = ([worst(getattr(step, name)) for step in leader] for name in ("predicted_error", "measured_error"))
    shown = [value for value in (*predicted, *measured) if math.isfinite(value) and value > 0]
    if shown:
        axes.plot(x, predicted, "_", color="tab:orange", markersize=9, markeredgewidth=2, label="predicted for the forecast")
        axes.plot(x, measured, "o", color="tab:blue", markersize=5, label="measured at a refresh")
        axes.set_yscale("log")
        axes.set_ylim(min(shown) / 2, 6 * max(shown))
        axes.legend(fontsize=8, loc="upper right", ncols=3)
    else:
        axes.text(0.5, 0.5, "nothing was forecast", transform=axes.transAxes, ha="center", va="center", fontsize=9)
    axes.set_ylabel("relative error of v")
    axes.set_xlabel("step (shaded: computed in full)")


def _shade_refreshes(axes: Any, leader: list[Any]) -> None:
    for step in leader:
        if step.is_computed:
            axes.axvspan(step.step - 0.5, step.step + 0.5, color="tab:blue", alpha=0.15, linewidth=0)
    axes.set_xlim(leader[0].step - 0.5, leader[-1].step + 0.5)
    axes.tick_params(labelsize=8)
    axes.yaxis.label.set_size(8)
    axes.xaxis.label.set_size(8)


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
    axes.set_xlabel("step", fontsize=8)


def _draw_map(axes: Any, values: Sequence[Sequence[float]], leader: list[Any], **options: Any) -> Any:
    extent = (leader[0].step - 0.5, leader[-1].step + 0.5, len(values) - 0.5, -0.5)
    axes.set_ylabel("group", fontsize=8)
    axes.set_yticks(range(len(values)))
    axes.tick_params(labelsize=7)
    return axes.imshow(values, aspect="auto", interpolation="nearest", extent=extent, **options)
