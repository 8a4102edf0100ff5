"""What `compare_compiled` measured, drawn."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from bench.record.figure import new_figure


def draw_quality(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed against PSNR, one curve for each family."""
    from matplotlib import colormaps

    figure = new_figure(9.5, 5.5)
    axes = figure.subplots()
    families = list(dict.fromkeys(facts["family"] for facts in rows if facts["kind"] != "reference"))
    colors = colormaps["tab10"]
    for index, family in enumerate(families):
        for is_compiled in (True, False):
            points = sorted(
                (facts["speedup_over_eager"], facts["psnr"])
                for facts in rows
                if facts["family"] == family and facts["is_compiled"] == is_compiled and math.isfinite(facts["psnr"])
            )
            if not points:
                continue
            is_ours = family == "AFCache"
            axes.plot(
                *zip(*points, strict=True),
                "o-" if is_compiled else "o:",
                color="black" if is_ours else colors(index % 10),
                linewidth=2.4 if is_ours else 1.2,
                markerfacecolor=None if is_compiled else "white",
                label=family + (", compiled" if is_compiled else ", eager"),
                zorder=3 if is_ours else 2,
            )
    compiled = next(facts for facts in rows if facts["contender"] == "compiled")
    axes.axvline(compiled["speedup_over_eager"], color="gray", linestyle="--", linewidth=1)
    axes.text(compiled["speedup_over_eager"], axes.get_ylim()[1], " compiled, uncached", va="top", color="gray", fontsize=8)
    axes.set(xlabel="times faster than the eager, uncached pipeline (wall clock)", ylabel="mean PSNR (dB)")
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=7, loc="outside right center")
    figure.savefig(path, dpi=120)


def draw_time(rows: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds of one image: its first steps, steps that run all blocks, other steps, the rest of the pipeline."""
    figure = new_figure(10, 1.2 + 0.24 * len(rows))
    axes = figure.subplots()
    names = [facts["contender"] for facts in rows]
    first, refresh, cached = (
        np.array([1e3 * facts[f"{name}_seconds"] for facts in rows])
        for name in ("first_two", "later_refreshes", "later_cached")
    )
    rest = np.array([1e3 * facts["rest_share"] * facts["seconds"] for facts in rows])
    left = np.zeros(len(rows))
    for label, values, color in (
        ("the first two steps", first, "tab:green"),
        ("later steps that run all blocks", refresh, "tab:blue"),
        ("cached steps", cached, "tab:orange"),
        ("text, decoder, sampling loop", rest, "lightgray"),
    ):
        axes.barh(names, values, left=left, color=color, label=label)
        left = left + values
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xlabel="milliseconds of one image")
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=120)
