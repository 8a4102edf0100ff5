"""What happened in the last run: a table, JSON, and a plot."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afcache.pipeline import require_runtime
from afcache.trajectory import Call, Trajectory

_MARKS = {"computed": "F", "mixed": "m", "forecast": "."}


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
        estimated_error: per sample, accumulated estimate after the step (relative velocity error times sigma, before
            correction); an indicator, not a bound.
        seconds: time of the call.

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

    @property
    def kind(self) -> str:
        """What happened: "computed" (for all samples), "mixed" (computed, adopted by some), or "forecast"."""
        if not self.is_computed:
            return "forecast"
        return "computed" if all(self.refreshed) else "mixed"


@dataclasses.dataclass(frozen=True)
class Report:
    """The last run of a pipeline; empty before the first.

    Attributes:
        config: the settings.
        steps: every transformer call, in order.
        num_steps: denoising steps of the schedule walked.
        num_blocks: blocks that one full call evaluates.
        state_bytes: memory of all guidance branches' states.
        guidance_scale: true CFG scale per sample as inferred from the run, NaN where the first step does not tell; empty
            without guidance branches.

    """

    config: dict[str, Any]
    steps: tuple[StepReport, ...]
    num_steps: int
    num_blocks: int
    state_bytes: int
    guidance_scale: tuple[float, ...]

    @property
    def block_evaluations(self) -> int:
        """Block evaluations that really ran."""
        return self.num_blocks * sum(step.is_computed for step in self.steps)

    @property
    def block_evaluations_uncached(self) -> int:
        """Block evaluations of the same calls without a cache."""
        return self.num_blocks * len(self.steps)

    @property
    def block_speedup(self) -> float:
        """How many times fewer block evaluations; 1 before a run."""
        return self.block_evaluations_uncached / self.block_evaluations if self.steps else 1.0

    def pattern(self, branch: int = 0) -> str:
        """One letter per step: F computed, m computed but not adopted by all samples, "." forecast."""
        return "".join(_MARKS[step.kind] for step in self.steps if step.branch == branch)

    def seconds(self, *, is_computed: bool) -> float:
        """Median time of computed or of forecast calls; NaN if there were none."""
        times = sorted(step.seconds for step in self.steps if step.is_computed == is_computed)
        return times[len(times) // 2] if times else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, summary first; what is unknown is None."""
        summary = {
            "pattern": self.pattern(),
            "block_evaluations": self.block_evaluations,
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
        """Draw errors over the steps, with the computed ones marked, to a picture file.

        Raises:
            ValueError: nothing ran yet.

        """
        if not self.steps:
            raise ValueError("report is empty: run the pipeline before plotting.")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        leader = [step for step in self.steps if step.branch == 0]
        for step in leader:
            if step.is_computed:
                axes.axvspan(step.step - 0.5, step.step + 0.5, color="tab:blue", alpha=0.15, linewidth=0)
        x = [step.step for step in leader]
        axes.plot(x, [_worst(step.estimated_error) for step in leader], drawstyle="steps-mid", label="estimated, accumulated")
        axes.plot(x, [_worst(step.measured_error) for step in leader], "o", label="measured at a refresh (relative)")
        tolerance = 0.0 if self.config["policy"] == "fixed" else self.config["tolerance"]
        if tolerance > 0:
            axes.axhline(tolerance, color="tab:red", linestyle="--", linewidth=1, label="tolerance")
        axes.set_yscale("symlog", linthresh=1e-3)
        largest = [_worst(step.measured_error) for step in leader] + [tolerance]
        axes.set_ylim(0, 2 * max(value for value in largest if math.isfinite(value)) or 1.0)
        axes.set_xlabel("step (shaded: computed in full)")
        axes.set_ylabel("error of the velocity")
        axes.set_title(f"{self.pattern()}   {self.block_speedup:.2f}x fewer block evaluations", fontsize=9, family="monospace")
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=120)

    def __str__(self) -> str:
        if not self.steps:
            return f"AFCache ({self._settings()}): nothing has run yet."
        computed, cached = self.seconds(is_computed=True), self.seconds(is_computed=False)
        forecast_time = f", forecast call {cached * 1e3:.1f} ms" if math.isfinite(cached) else ""
        lines = [
            f"AFCache ({self._settings()})",
            f"  steps      {self.pattern()}   F computed, . forecast"
            + (", m computed for some samples" if "m" in self.pattern() else ""),
            f"  blocks     {self.block_evaluations} of {self.block_evaluations_uncached} evaluations ran: "
            f"{self.block_speedup:.2f}x fewer",
            f"  time       computed call {computed * 1e3:.1f} ms{forecast_time} (medians)",
        ]
        if self.config["policy"] == "none":
            return "\n".join(lines)
        limit = "" if self.config["policy"] == "fixed" else f" (tolerance {self.config['tolerance']:g})"
        lines.append(f"  estimate   {self._largest_estimate():.4f} at most between refreshes{limit}")
        lines.append(f"  state      {self.state_bytes / 2**20:.2f} MiB")
        if self.guidance_scale:
            scale = self.guidance_scale[0]
            found = f"true CFG scale {scale:.2f}" if math.isfinite(scale) else "true CFG scale unknown"
            lines.append(f"  guidance   {found}, {self._branches()} branches decide together")
        if self.block_evaluations == self.block_evaluations_uncached:
            lines.append("  Nothing was saved: too few steps, or the tolerance is too small.")
        return "\n".join(lines)

    def _settings(self) -> str:
        if self.config["policy"] == "none":
            return "policy none"
        if self.config["policy"] == "fixed":
            interval, name, order = (self.config[key] for key in ("interval", "forecast", "order"))
            return f"a refresh every {interval} steps, {name} forecast of order {order}"
        return (
            f"tolerance {self.config['tolerance']:g}, order {self.config['order']}, {self.config['batch_decisions']} decisions"
        )

    def _largest_estimate(self) -> float:
        return max((_worst(step.estimated_error) for step in self.steps if step.branch == 0), default=0.0)

    def _branches(self) -> int:
        return 1 + max(step.branch for step in self.steps)


def report(pipe: Any) -> Report:
    """Read what the last run of a pipeline did. Before a run the report is empty.

    Raises:
        ValueError: the pipeline was not passed to `compile_pipeline`.
    Cost:
        waits for the device and copies the step records to the host.

    """
    runtime = require_runtime(pipe)
    trajectory = runtime.last_trajectory(pipe)
    config = runtime.config.to_dict()
    if trajectory is None:
        return Report(config, (), 0, 0, 0, ())
    scale = trajectory.guidance_scale
    return Report(
        config=config,
        steps=tuple(_read_call(call, trajectory) for call in trajectory.calls),
        num_steps=len({call.step for call in trajectory.calls}),
        num_blocks=trajectory.num_blocks,
        state_bytes=trajectory.bytes,
        guidance_scale=() if scale is None else _floats(scale),
    )


def _read_call(call: Call, trajectory: Trajectory) -> StepReport:
    batch = trajectory.shape[0]
    record = call.record
    unknown = (math.nan,) * batch
    # The leading branch's estimate is the step's: it is made for all branches together.
    leader = next(other.record for other in trajectory.calls if other.step == call.step and other.branch == 0)
    return StepReport(
        step=call.step,
        branch=call.branch,
        sigma=float(trajectory.sigmas[call.step]),
        refreshed=(True,) * batch if record is None else tuple(record.refresh.tolist()),
        is_computed=True if record is None else bool(record.is_computed),
        predicted_error=unknown if record is None else _floats(record.predicted_error),
        measured_error=unknown if record is None else _floats(record.measured_error),
        estimated_error=(0.0,) * batch if leader is None else _floats(leader.accumulated_error),
        seconds=call.elapsed(),
    )


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.to(torch.float64).tolist())


def _worst(values: tuple[float, ...]) -> float:
    return max((value for value in values if math.isfinite(value)), default=math.nan)


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by None: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
