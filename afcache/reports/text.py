"""A report in words."""

import math
from typing import TYPE_CHECKING, Any

from afcache.functional.groups.strategies.table import MARKS
from afcache.reports.reason import why_nothing_was_saved
from afcache.reports.values import allowed, spread, worst
from afcache.settings.rules import RULES

if TYPE_CHECKING:
    from afcache.reports.summary import Report


def render(report: "Report") -> str:
    """What `str(report)` says, a line for each subject."""
    settings = describe_settings(report.config)
    if not report.steps:
        return f"AFCache ({settings}): nothing has run yet."
    lines = [f"AFCache ({settings})", _steps_line(report), _blocks_line(report), _time_line(report), *_traffic_lines(report)]
    if not RULES[report.config["policy"]].is_cached:
        return "\n".join(lines)
    lines += [_estimate_line(report), *_group_lines(report), f"  state      {report.state_bytes / 2**20:.2f} MiB"]
    lines += _guidance_lines(report) + _restart_lines(report)
    if report.block_evaluations + report.mlp_evaluations >= report.block_evaluations_uncached:
        lines.append(f"  {why_nothing_was_saved(report)}")
    return "\n".join(lines)


def describe_settings(config: dict[str, Any]) -> str:
    """The policy and the settings that it follows, in a few words."""
    return RULES[config["policy"]].summary.format(**{**config, "tolerance": spread(config["tolerance"])})


def _steps_line(report: "Report") -> str:
    pattern = report.pattern()
    marks = {"m": "computed for some samples", "p": "some groups"}
    legend = "".join(f", {mark} {meaning}" for mark, meaning in marks.items() if mark in pattern)
    return f"  steps      {pattern}   F computed, . forecast{legend}"


def _blocks_line(report: "Report") -> str:
    mlps = f" and {report.mlp_evaluations} of MLPs alone" if report.mlp_evaluations else ""
    whole, speedup = report.block_evaluations_uncached, report.block_speedup
    return f"  blocks     {report.block_evaluations}{mlps} of {whole} evaluations ran: {speedup:.2f}x fewer"


def _time_line(report: "Report") -> str:
    computed, cached = report.seconds(is_computed=True), report.seconds(is_computed=False)
    forecast = f", forecast call {cached * 1e3:.1f} ms" if math.isfinite(cached) else ""
    return f"  time       computed call {computed * 1e3:.1f} ms{forecast} (medians)"


def _traffic_lines(report: "Report") -> list[str]:
    """One line for several ranks."""
    if not any(step.collectives for step in report.steps):
        return []
    kinds = {name: report.traffic(is_computed=flag) for name, flag in (("computed", True), ("forecast", False))}
    said = [
        f"{name} call {collectives:.0f} collectives, {size / 1024:.1f} KiB"
        for name, (collectives, size) in kinds.items()
        if math.isfinite(size)
    ]
    return [f"  messages   {'; '.join(said)} sent by each rank (medians)"]


def _estimate_line(report: "Report") -> str:
    largest = max((worst(step.estimated_error) for step in report.steps if step.branch == 0), default=0.0)
    limit = f" (tolerance {allowed(report)})" if RULES[report.config["policy"]].is_error_controlled else ""
    return f"  estimate   {largest:.4f} at most between refreshes{limit}"


def _group_lines(report: "Report") -> list[str]:
    """One line for each group, for the first sample and the leading branch."""
    leader = [step for step in report.steps if step.branch == 0 and step.groups]
    if not leader:
        return []
    lines = ["  groups     F computed, t Taylor, s similarity, a attention reused, d difference; stability at the end"]
    for index in range(len(leader[0].groups)):
        members = [step.groups[index] for step in leader]
        choices = "".join(MARKS[member.choice[0]] for member in members)
        lines.append(f"    {index:>6}   {choices}   {members[-1].stability[0]:.3f}")
    return lines


def _restart_lines(report: "Report") -> list[str]:
    """One line for each reason."""
    batch = len(report.steps[0].refreshed)
    lines = []
    for reason in dict.fromkeys(restart.reason for restart in report.restarts):
        places = []
        for restart in (each for each in report.restarts if each.reason == reason):
            samples = "" if len(restart.samples) == batch else f" (images {', '.join(map(str, restart.samples))})"
            places.append(f"{restart.step}{samples}")
        lines.append(f"  restarted  {reason}: at step {', '.join(places)}")
    return lines


def _guidance_lines(report: "Report") -> list[str]:
    if not report.guidance_scale:
        return []
    scale = report.guidance_scale[0]
    found = f"true CFG scale {scale:.2f}" if math.isfinite(scale) else "true CFG scale unknown"
    branches = max(report.branches, 1 + max(step.branch for step in report.steps))
    return [f"  guidance   {found}, {branches} branches decide together"]
