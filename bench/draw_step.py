"""One image of mini-FLUX, step by step: what the default policy predicts, measures and decides, and what is really true.

The true error of a forecast is found afterwards, by evaluating the model at the latents of every cached step; the cache never
sees it. Drawn for docs/how-it-works.md.

python -m bench.draw_step
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import afcache
from afcache.reports.plots import draw_errors, draw_estimate, refused_estimates
from bench.mini_flux import sampling
from bench.record.naming import RESULTS, result_path
from bench.record.recording import write_result

SUBJECT = "step"
SEED = 0
STEPS = 28
TRANSFORMER_INPUTS = (
    "hidden_states",
    "encoder_hidden_states",
    "pooled_projections",
    "timestep",
    "img_ids",
    "txt_ids",
    "guidance",
)
REASONS = {"warmup": "W", "tolerance": "T", "growth limit": "G"}


class Walk(NamedTuple):
    """A trajectory: the latents before every step and after the last, and what the cache says of it."""

    latents: list[Tensor]
    report: afcache.Report


def main(folder: Path = RESULTS, *, steps: int = STEPS) -> None:
    """Draw the picture, and write its numbers."""
    pipe = sampling.load()
    problem = sampling.prepare(pipe, [SEED], steps=steps)
    exact = walk(pipe, afcache.CacheConfig(policy="none"), problem)
    cached = walk(pipe, afcache.PRESETS["balanced"], problem)
    uncorrected = walk(pipe, afcache.policy("adaptive", correction=False), problem)
    rows = describe(pipe, problem, cached)
    for row, distance, other in zip(rows, distances(cached, exact), distances(uncorrected, exact), strict=True):
        row["distance of the latents after it"] = distance
        row["the same without catch-up"] = other
    draw(rows, cached, result_path(SUBJECT, ".png", folder=folder))
    write_result(
        SUBJECT,
        "One image, step by step",
        rows,
        notes=[
            f"{sampling.prompt_of(SEED)!r}, seed {SEED}, {steps} steps, CFG 1, the default preset.",
            "Errors of forecasts are relative to the computed velocity; those of cached steps were found afterwards, by",
            "evaluating the model at their latents.",
            "The estimate of a computed step is what it would have come to, had the step been forecast.",
            "Distances are relative to the uncached latents; without catch-up the decisions are others.",
            "",
            "```",
            *str(cached.report).splitlines(),
            "```",
        ],
        folder=folder,
    )


def walk(pipe: Any, config: afcache.CacheConfig, problem: sampling.Prepared) -> Walk:
    """Draw with these settings, and keep the latents."""
    latents = [problem.branches[0].hidden_states]

    def keep(pipe: Any, step: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        del pipe, step, timestep
        latents.append(values["latents"].clone())
        return values

    afcache.compile_pipeline(pipe, config, compile=False)
    generator = torch.Generator().manual_seed(SEED)
    options = {**sampling.SETTINGS, "num_inference_steps": len(problem.sigmas) - 1, "output_type": "latent"}
    pipe(sampling.prompt_of(SEED), generator=generator, callback_on_step_end=keep, **options)
    return Walk(latents, afcache.report(pipe))


def describe(pipe: Any, problem: sampling.Prepared, cached: Walk) -> list[dict[str, Any]]:
    """A row for every step."""
    refused = refused_estimates(cached.report)
    tolerance = cached.report.config["tolerance"] * cached.report.tolerance_scale
    rows = []
    for step in cached.report.steps:
        index = step.step
        estimate = refused.get(index, step.estimated_error[0])
        reason = ""
        if step.is_computed:
            reason = "warmup" if step.is_forced else "tolerance" if estimate >= tolerance else "growth limit"
        rows.append(
            {
                "step": index,
                "sigma": step.sigma,
                "computed because of": reason,
                "predicted error": shown(step.predicted_error[0]),
                "true error": shown(step.measured_error[0])
                if step.is_computed
                else true_error(pipe, problem, cached.latents, index),
                "estimate since the last refresh": estimate,
            }
        )
    return rows


def shown(value: float) -> float | str:
    """Nothing is known before the first forecast."""
    return value if math.isfinite(value) else "-"


def true_error(pipe: Any, problem: sampling.Prepared, latents: list[Tensor], index: int) -> float:
    """||v_hat - v|| / ||v|| of the forecast that a cached step was taken with."""
    sigma, after = problem.sigmas[index], problem.sigmas[index + 1]
    forecast = (latents[index + 1] - latents[index]) / (after - sigma)
    inputs = problem.branches[0]._replace(hidden_states=latents[index], timestep=sigma[None])
    given = {name: value for name, value in inputs._asdict().items() if name in TRANSFORMER_INPUTS}
    with torch.no_grad(), afcache.uncached(pipe):
        velocity = pipe.transformer(**given, return_dict=False)[0]
    return float((forecast - velocity).norm() / velocity.norm())


def distances(walked: Walk, exact: Walk) -> list[float]:
    """Relative distance of the latents after every step."""
    pairs = zip(walked.latents[1:], exact.latents[1:], strict=True)
    return [float((latents - truth).norm() / truth.norm()) for latents, truth in pairs]


def draw(rows: list[dict[str, Any]], cached: Walk, file: Path) -> None:
    """Three pictures above each other: errors of forecasts, the estimate that decides, and where the latents went."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8.6), layout="constrained")
    FigureCanvasAgg(figure)
    errors, estimate, path = figure.subplots(3, 1, height_ratios=[3, 3, 2])
    steps = [row["step"] for row in rows]
    leader = list(cached.report.steps)
    draw_errors(errors, leader)
    cached_steps = [row for row in rows if not row["computed because of"]]
    errors.plot(
        [row["step"] for row in cached_steps],
        [row["true error"] for row in cached_steps],
        "o",
        color="tab:blue",
        markerfacecolor="none",
        markersize=5,
        label="true, unknown to the cache",
    )
    errors.legend(fontsize=8, loc="upper right", ncols=3)
    errors.set_title("error of each step's forecast, relative to what the model computes", fontsize=9)
    draw_estimate(estimate, cached.report, leader)
    estimate.set_title("what is predicted to add up since the last refresh decides", fontsize=9)
    for row in rows:
        if row["computed because of"]:
            letter = REASONS[row["computed because of"]]
            estimate.annotate(
                letter, (row["step"], 0.02), xycoords=("data", "axes fraction"), fontsize=9, ha="center", weight="bold"
            )
    path.plot(steps, [row["the same without catch-up"] for row in rows], color="tab:gray", label="without catch-up")
    path.plot(steps, [row["distance of the latents after it"] for row in rows], color="tab:green", label="with catch-up")
    path.set_ylim(bottom=0)
    path.set_xlim(estimate.get_xlim())
    path.set_title("how far the latents are from the uncached ones", fontsize=9)
    path.set_xlabel("step", fontsize=8)
    path.tick_params(labelsize=8)
    path.legend(fontsize=8)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
