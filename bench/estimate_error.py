"""Estimate against truth on mini-FLUX: does the measured error follow the tolerance, and how far off is the estimate?

    python -m bench.estimate_error --seeds 20

The settings are those that the presets have at each tolerance. For each: the relative error of the final latents, the sum
of the estimates, and, over all refreshes, the ratio of the error that was predicted for the forecast to the one that was
then measured.
"""

import argparse
import dataclasses
import math
import statistics
from typing import Any

import numpy as np

import afcache
from afcache.settings.config import CacheConfig
from afcache.settings.presets import tuned
from bench.mini_flux import sampling
from bench.record.recording import write_result
from bench.record.render import table
from bench.record.spread import quantile


def ratios(report: afcache.Report) -> list[float]:
    """Predicted over measured velocity error at every refresh that had both."""
    pairs = [(step.predicted_error[0], step.measured_error[0]) for step in report.steps if step.is_computed]
    return [p / m for p, m in pairs if math.isfinite(p) and math.isfinite(m) and p > 0 and m > 0]


def estimated_total(report: afcache.Report) -> float:
    """The estimates of all segments, added up."""
    totals, last = 0.0, 0.0
    for step in report.steps:
        if step.is_computed:
            totals, last = totals + last, 0.0
        else:
            last = step.estimated_error[0]
    return totals + last


def spearman(first: list[float], second: list[float]) -> float:
    """Rank correlation."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def measure(pipe: Any, config: CacheConfig, exact: dict[int, np.ndarray]) -> tuple[dict[str, Any], list[float], list[float]]:
    """One row, and per seed the estimate and the truth."""
    afcache.compile_pipeline(pipe, config, compile=False)
    truth, estimates, scatter, speed = [], [], [], []
    for seed, reference in exact.items():
        latents = sampling.draw(pipe, seed, output_type="latent")
        report = afcache.report(pipe)
        truth.append(float(np.linalg.norm(latents - reference) / np.linalg.norm(reference)))
        estimates.append(estimated_total(report))
        scatter += ratios(report)
        speed.append(report.block_speedup)
    afcache.restore_pipeline(pipe)
    row = {
        "tolerance": config.tolerance,
        "correction": config.correction,
        "fewer block evaluations": statistics.harmonic_mean(speed),
        "latent error, median": statistics.median(truth),
        "latent error, range": f"{min(truth):.2g} to {max(truth):.2g}",
        "sum of estimates, median": statistics.median(estimates),
        "predicted / measured, median": _log_quantile(scatter, 0.5),
        "predicted / measured, 10 to 90 %": " to ".join(f"{_log_quantile(scatter, share):.2f}" for share in (0.1, 0.9)),
        "refreshes": len(scatter),
    }
    return row, estimates, truth


def _log_quantile(ratios: list[float], share: float) -> float:
    """Of ratios, so that a half and a double are equally far from one."""
    return float(np.exp(quantile(np.log(ratios).tolist(), share)))


def main() -> None:
    """Measure and write bench/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.004, 0.016, 0.064])
    arguments = parser.parse_args()
    pipe = sampling.load()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    exact = {seed: sampling.draw(pipe, seed, output_type="latent") for seed in seeds}
    rows, all_estimates, all_truth = [], [], []
    for correction in (False, True):
        for tolerance in arguments.tolerances:
            config = dataclasses.replace(tuned(tolerance), correction=correction)
            row, estimates, truth = measure(pipe, config, exact)
            rows.append(row)
            print(row, flush=True)
            if not correction:
                all_estimates += estimates
                all_truth += truth
    notes = [
        f"Seeds {seeds.start} to {seeds.stop - 1}, 28 steps, no CFG, float32, batch 1. Latent error: relative L2 of the final "
        "latents against the uncached ones of the same seed.",
        "The estimate is made before correction, relative to the velocity and weighted by the step in sigma; it is an "
        "indicator, not a bound.",
        f"Rank correlation of summed estimate and latent error over all seeds and tolerances, without correction: "
        f"{spearman(all_estimates, all_truth):.2f}.",
    ]
    print(table(rows))
    print(write_result("estimate", "Estimated against measured error on mini-FLUX", rows, notes=notes))


if __name__ == "__main__":
    main()
