"""What happened in the last run, as frozen data; `text` and `plots` show it."""

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

from afcache.reports.plots import draw_report
from afcache.reports.text import render

_MARKS = {"computed": "F", "mixed": "m", "partial": "p", "forecast": "."}


@dataclasses.dataclass(frozen=True)
class GroupReport:
    """What a group of blocks did at one call, per sample.

    Attributes:
        choice: "computed", or the strategy followed: "taylor", "similarity", "attention", "difference".
        distance: the statistic of its strategy; NaN where it has none.
        threshold: what it was compared with, 0 at a refresh; NaN where it has none.
        stability: corrected similarity of successive residuals, averaged; 1 is most stable.
        stability_class: 0 (most stable) to 3.

    """

    choice: tuple[str, ...]
    distance: tuple[float, ...]
    threshold: tuple[float, ...]
    stability: tuple[float, ...]
    stability_class: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One transformer call.

    Attributes:
        step: position in the schedule, from zero.
        branch: guidance branch in order of calls.
        sigma: noise level.
        refreshed: per sample, whether this step's computed features were adopted.
        is_computed: whether the block stack ran.
        predicted_error: per sample, relative velocity error expected of the forecast; NaN if unknown.
        measured_error: per sample, what a refresh found; NaN on other steps.
        estimated_error: per sample, accumulated estimate after the step (relative velocity error times sigma, weighted as the
            settings say, before correction); an indicator, not a bound.
        seconds: time of the call.
        evaluations: blocks that ran.
        mlp_evaluations: blocks whose MLPs alone ran, on reused attention outputs; not among the others.
        groups: what each group of blocks did; empty without groups.
        collectives: that this rank took part in; 0 alone.
        bytes_sent: by this rank to others, in them (`afcache.functional.ranks.traffic`).
        is_forced: whether it was to be computed whatever is found (warmup, a plan, a last step asked for).
        refused_error: per sample, what the estimate would have come to, had the step been forecast; NaN where it was, or where
            that is not known (after the first steps, and of several ranks); empty in calls of other branches than the first.

    """

    step: int
    branch: int
    sigma: float
    refreshed: tuple[bool, ...]
    is_computed: bool
    predicted_error: tuple[float, ...]
    measured_error: tuple[float, ...]
    estimated_error: tuple[float, ...]
    seconds: float
    evaluations: int
    mlp_evaluations: int = 0
    groups: tuple[GroupReport, ...] = ()
    collectives: int = 0
    bytes_sent: int = 0
    is_forced: bool = False
    refused_error: tuple[float, ...] = ()

    @property
    def kind(self) -> str:
        """What happened: "computed" (for all samples), "mixed" (adopted by some), "partial" (some groups), or "forecast"."""
        if not self.is_computed:
            return "partial" if self.groups and self.evaluations + self.mlp_evaluations else "forecast"
        return "computed" if all(self.refreshed) else "mixed"


@dataclasses.dataclass(frozen=True)
class RestartReport:
    """Samples that began anew in the middle of an image: nothing remembered was valid any more.

    Attributes:
        step: position in the schedule.
        reason: "latents" (they were not where the last step had led), "conditioning" (another prompt, control or image prompt),
            "weights" (adapters), "schedule" (noise levels were edited) or "steps" (some were left out, or walked again).
        samples: which of the batch.

    """

    step: int
    reason: str
    samples: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """The last run of a pipeline; empty before the first.

    Attributes:
        config: the settings that were drawn with; `tolerance`, `max_growth` and `damping` are tuples of one number for each
            image where those differ (`afcache.using`).
        steps: every transformer call, in order.
        num_steps: denoising steps of the schedule walked.
        num_blocks: blocks that one full call evaluates.
        state_bytes: memory of all guidance branches' states.
        guidance_scale: true CFG scale per sample as inferred from the run, NaN where the first step does not tell; empty
            without guidance branches.
        restarts: what began anew on the way.
        branches: how many guidance branches decided together at the last step.
        tolerance_scale: how many times the tolerance the estimate was kept below; above 1 with fewer than 16 steps
            (`afcache.functional.plans.tolerance_scale`).
        correction: how what forecasts left out was returned: "step" (at refreshes, Euler's step), "solver" (as the response of
            a solver that mixes several outputs asks, `afcache.functional.solver_response`), or "off".

    """

    config: dict[str, Any]
    steps: tuple[StepReport, ...]
    num_steps: int
    num_blocks: int
    state_bytes: int
    guidance_scale: tuple[float, ...]
    restarts: tuple[RestartReport, ...] = ()
    branches: int = 1
    tolerance_scale: float = 1.0
    correction: str = "off"

    @property
    def block_evaluations(self) -> int:
        """Block evaluations that really ran; those whose MLPs alone ran are counted by `mlp_evaluations`."""
        return sum(step.evaluations for step in self.steps)

    @property
    def mlp_evaluations(self) -> int:
        """Blocks whose MLPs alone ran, on reused attention outputs."""
        return sum(step.mlp_evaluations for step in self.steps)

    @property
    def block_evaluations_uncached(self) -> int:
        """Block evaluations of the same calls without a cache."""
        return self.num_blocks * len(self.steps)

    @property
    def block_speedup(self) -> float:
        """How many times fewer block evaluations, MLPs alone counted as a whole block; 1 before a run."""
        ran = self.block_evaluations + self.mlp_evaluations
        return self.block_evaluations_uncached / ran if self.steps else 1.0

    def pattern(self, branch: int = 0) -> str:
        """One letter per step: F computed, m not adopted by all samples, p some groups alone, "." forecast or reused."""
        return "".join(_MARKS[step.kind] for step in self.steps if step.branch == branch)

    def seconds(self, *, is_computed: bool) -> float:
        """Median time of computed or of forecast calls; NaN if there were none."""
        times = sorted(step.seconds for step in self.steps if step.is_computed == is_computed)
        return times[len(times) // 2] if times else math.nan

    def traffic(self, *, is_computed: bool) -> tuple[float, float]:
        """Collectives and bytes sent by this rank, median of computed or of forecast calls; NaN if there were none."""
        calls = [step for step in self.steps if step.is_computed == is_computed]
        if not calls:
            return math.nan, math.nan
        return statistics.median(s.collectives for s in calls), statistics.median(s.bytes_sent for s in calls)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, summary first; what is unknown is None."""
        summary = {
            "pattern": self.pattern(),
            "block_evaluations": self.block_evaluations,
            "mlp_evaluations": self.mlp_evaluations,
            "block_evaluations_uncached": self.block_evaluations_uncached,
            "block_speedup": self.block_speedup,
            "median_seconds_computed": self.seconds(is_computed=True),
            "median_seconds_forecast": self.seconds(is_computed=False),
        }
        return _finite({**summary, **dataclasses.asdict(self)})

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict` to a file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def plot(self, path: str | Path) -> None:
        """Draw errors over the steps, and what each group of blocks did, to a picture file.

        Above, the estimate that decides, accumulated since the last refresh, with the tolerance; below, in units of its own,
        the relative error of each forecast: as predicted, and as measured at refreshes.

        Raises:
            ValueError: nothing ran yet.

        """
        if not self.steps:
            raise ValueError("report is empty: run the pipeline before plotting.")
        draw_report(self, path)

    def __str__(self) -> str:
        return render(self)


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by None: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
