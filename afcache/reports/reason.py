"""Why a run saved nothing, and what would help: read from what it recorded."""

import math
from typing import TYPE_CHECKING

from afcache.settings.rules import RULES

if TYPE_CHECKING:
    from afcache.reports.summary import Report, StepReport

# Why a step ran, in the order in which they are told.
_SAID = {
    "forced": "{} always computed",
    "restarted": "{} after a new start",
    "broken": "{} with an error that is no number",
    "tolerance": "{} expected to reach the tolerance",
    "growth": "{} too far from the last refresh (max_growth)",
    "batch": "{} asked for by some images alone",
    "unknown": "{} for what was not recorded",
}

# What float32 leaves open of a comparison.
_ROUNDING = 1e-5


def why_nothing_was_saved(report: "Report") -> str:
    """Two lines: how many steps ran for which reason, and what would help."""
    rule = RULES[report.config["policy"]]
    if not rule.is_error_controlled or report.config["layerwise"] is not None:
        return f"Nothing was saved: policy {report.config['policy']!r} computed every step."
    reasons = reasons_of(report)
    counts = {reason: list(reasons.values()).count(reason) for reason in _SAID}
    told = ", ".join(said.format(counts[reason]) for reason, said in _SAID.items() if counts[reason])
    return f"Nothing was saved: of {report.num_steps} steps {told}.\n  {_cure(report, reasons, counts)}"


def reasons_of(report: "Report") -> dict[int, str]:
    """Why each step of an error-controlled run was computed, by its index; guidance branches decide together."""
    found: dict[int, str] = {}
    refreshes: list[list[float]] = [[] for _ in report.steps[0].refreshed]
    for step in report.steps:
        if step.branch == 0 and step.is_computed:
            images = range(len(step.refreshed))
            own = {_of_image(report, step, image, refreshes[image]) for image in images}
            found[step.step] = _reason(report, step, own)
        for image, refreshed in enumerate(step.refreshed):
            if step.branch == 0 and refreshed:
                refreshes[image].append(step.sigma)
    return found


def allowing_tolerance(report: "Report", reasons: dict[int, str]) -> float:
    """The least tolerance that would have let a step be forecast, all else the same, in two digits; NaN if none is known."""
    estimates = [
        max(step.refused_error) / report.tolerance_scale
        for step in report.steps
        if step.branch == 0 and reasons.get(step.step) == "tolerance"
    ]
    least = min(filter(math.isfinite, estimates), default=math.nan)
    if not least > 0:
        return math.nan
    digit = 10.0 ** (math.floor(math.log10(least)) - 1)
    return (math.floor(least / digit) + 1) * digit


def _reason(report: "Report", step: "StepReport", own: set[str]) -> str:
    """One reason for all images: the first of those that bind, unless only some needed the step."""
    if step.is_forced:
        return "forced"
    if "none" in own and len(own) > 1 and report.config["batch_decisions"] == "independent":
        return "batch"
    return next((reason for reason in _SAID if reason in own), "unknown")


def _of_image(report: "Report", step: "StepReport", image: int, refreshes: list[float]) -> str:
    """Why one image was refreshed at a step that is not forced; "none" if it was not, or for the sake of others."""
    if not step.refreshed[image]:
        return "none"
    if len(refreshes) < 2:
        return "forced"
    predicted = step.predicted_error[image]
    if not math.isfinite(predicted):
        return "restarted" if math.isinf(predicted) else "broken"
    gap, last = abs(step.sigma - refreshes[-1]), abs(refreshes[-1] - refreshes[-2])
    if gap > _setting(report, "max_growth", image) * last * (1 - _ROUNDING):
        return "growth"
    refused = step.refused_error[image] if step.refused_error else math.nan
    tolerance = _setting(report, "tolerance", image) * report.tolerance_scale
    return "unknown" if math.isnan(refused) else "tolerance" if refused >= tolerance * (1 - _ROUNDING) else "none"


def _setting(report: "Report", name: str, image: int) -> float:
    value = report.config[name]
    return value[image] if isinstance(value, tuple) else value


def _cure(report: "Report", reasons: dict[int, str], counts: dict[str, int]) -> str:
    if counts["forced"] == report.num_steps:
        return "More steps would leave some to forecast."
    if counts["batch"]:
        return 'Drawn alone some of these images save; a larger tolerance or batch_decisions="shared" may help.'
    allowing = allowing_tolerance(report, reasons)
    if math.isfinite(allowing):
        return f"A tolerance of about {allowing:g} would have let one be forecast; faster presets and more steps help, too."
    if counts["restarted"]:
        return "What steers the model must stay for three steps or more."
    if counts["growth"]:
        return "A larger max_growth would allow more."
    return "More steps would help." if not counts["broken"] else "The model returned values that are not finite."
