"""Reading a runtime's records, once, after a run."""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from afcache.functional import error_control
from afcache.functional.groups.group import divide
from afcache.functional.groups.strategies.table import STRATEGIES
from afcache.functional.guidance import weigh
from afcache.functional.plans import tolerance_scale
from afcache.functional.ranks.step import Layout
from afcache.functional.ranks.traffic import Traffic, step_traffic
from afcache.functional.state import GroupRecord, StepRecord
from afcache.reports.summary import GroupReport, Report, RestartReport, StepReport
from afcache.runtime.binding import require_runtimes
from afcache.runtime.branches import states_of
from afcache.runtime.notes import Restart, Role, TimedCall
from afcache.runtime.runtime import Runtime
from afcache.runtime.trajectory import Trajectory
from afcache.settings.changes import summarize
from afcache.settings.config import CacheConfig


def report(pipe: Any) -> Report:
    """Read what the last run of a pipeline did. Before a run the report is empty.

    Raises:
        ValueError: the pipeline was not passed to `compile_pipeline`.
    Cost:
        waits for the device and copies the step records to the host.

    """
    runtimes = require_runtimes(pipe)
    found = [(runtime, runtime.last_trajectory(pipe)) for runtime in runtimes]
    drawn = [(runtime, trajectory) for runtime, trajectory in found if trajectory is not None]
    if not drawn:
        return Report(runtimes[0].config.to_dict(), (), 0, 0, 0, ())
    # Several transformers share a schedule; what one of them drew before belongs to another image.
    schedule = pipe.scheduler.timesteps
    present = [each for each in drawn if each[1].scheduled.timesteps is schedule] or drawn[-1:]
    return functools.reduce(_join, (_read(*each) for each in present))


def _join(first: Report, second: Report) -> Report:
    """The report of an image that two transformers drew, one after the other or at once."""
    branches: collections.Counter[int] = collections.Counter(step.step for step in first.steps)
    moved = (dataclasses.replace(step, branch=step.branch + branches[step.step]) for step in second.steps)
    steps = sorted((*first.steps, *moved), key=lambda step: (step.step, step.branch))
    return dataclasses.replace(
        first,
        steps=tuple(steps),
        num_steps=len({step.step for step in steps}),
        state_bytes=first.state_bytes + second.state_bytes,
        guidance_scale=first.guidance_scale or second.guidance_scale,
        restarts=tuple(sorted({*first.restarts, *second.restarts}, key=lambda restart: (restart.step, restart.reason))),
        branches=max(first.branches, second.branches, 1 + max(step.branch for step in steps)),
    )


def _read(runtime: Runtime, trajectory: Trajectory) -> Report:
    scale = _guidance_scale(runtime, trajectory)
    layout = None if runtime.parallel is None else runtime.parallel.layout
    walked = trajectory.sigmas[trajectory.first_index :]
    return Report(
        config=summarize(trajectory.settings),
        steps=tuple(_read_call(call, branch, trajectory, layout) for call, branch in _in_order(trajectory.calls)),
        num_steps=len({call.step for call in trajectory.calls}),
        num_blocks=runtime.steps.sizes.num_blocks,
        state_bytes=trajectory.bytes,
        guidance_scale=() if scale is None else _floats(scale),
        branches=max(1, len(states_of(trajectory.present))),
        restarts=_read_restarts(trajectory),
        tolerance_scale=float(tolerance_scale(walked)) if runtime.config.rule.is_error_controlled else 1.0,
        correction=trajectory.correction,
    )


def _guidance_scale(runtime: Runtime, trajectory: Trajectory) -> Tensor | None:
    """Of the prompt's branch, whose place in a shared call the family knows."""
    scale, pair = trajectory.guidance.scale, trajectory.guidance.pair
    is_turned = len(pair) == 1 and not runtime.family.calls.prompt_first
    return 1 - scale if scale is not None and is_turned else scale


# The leading branch is the first of its step, one that nobody knew before the last.
_ORDER: dict[Role, int] = {"leads": 0, "follows": 1, "joins": 2}


def _in_order(calls: list[TimedCall]) -> Iterator[tuple[TimedCall, int]]:
    """Calls and the numbers of their branches, step by step."""
    for _, of_step in itertools.groupby(calls, key=lambda call: call.step):
        ordered = sorted(of_step, key=lambda call: _ORDER[call.role])
        yield from ((call, branch) for branch, call in enumerate(ordered))


def _read_restarts(trajectory: Trajectory) -> tuple[RestartReport, ...]:
    """What began anew, by steps; what several branches say of one step counts once."""
    found: dict[tuple[int, str], list[bool]] = {}
    batch = trajectory.shape[0]
    noted = list(trajectory.restarts)
    for call, branch in _in_order(trajectory.calls):
        # What strangers to the image do is no restart of it.
        is_own = branch == 0 or call.role != "joins"
        if is_own and call.record is not None and call.record.restarted is not None:
            noted.append(Restart(call.step, "latents", call.record.restarted))
    noted += [Restart(call.step, "conditioning") for call, branch in _in_order(trajectory.calls) if _is_other(call, branch)]
    for step, reason, flags in noted:
        samples = [True] * batch if flags is None else flags.expand(batch).tolist()
        before = found.get((step, reason), [False] * batch)
        found[step, reason] = [a or b for a, b in zip(samples, before, strict=True)]
    return tuple(
        RestartReport(step, reason, tuple(index for index, flag in enumerate(samples) if flag))
        for (step, reason), samples in sorted(found.items())
        if any(samples)
    )


def _is_other(call: TimedCall, branch: int) -> bool:
    """Whether a branch that nobody knew took the leading one's place: another prompt."""
    return branch == 0 and call.role == "joins"


def _read_call(call: TimedCall, branch: int, trajectory: Trajectory, layout: Layout | None) -> StepReport:
    batch, config = trajectory.shape[0], trajectory.bound.config
    record = call.record
    unknown = (math.nan,) * batch
    # The leading branch's estimate is the step's: it is made for all branches together.
    at_step = [other for other in trajectory.calls if other.step == call.step]
    leader = min(at_step, key=lambda other: _ORDER[other.role]).record
    is_computed = True if record is None else bool(record.is_computed)
    evaluations, mlp_evaluations = _count(record, is_computed, trajectory.bound.steps.sizes.num_blocks, config)
    traffic = Traffic()
    if layout is not None and trajectory.messages is not None:
        traffic = step_traffic(layout, trajectory.messages, config, is_computed=is_computed, evaluations=evaluations)
    return StepReport(
        step=call.step,
        branch=branch,
        sigma=float(trajectory.sigmas[call.step]),
        refreshed=(True,) * batch if record is None else tuple(record.refresh.tolist()),
        is_computed=is_computed,
        predicted_error=unknown if record is None else _floats(record.predicted_error),
        measured_error=unknown if record is None else _floats(record.measured_error),
        estimated_error=(0.0,) * batch if leader is None else _floats(leader.accumulated_error),
        seconds=call.elapsed(),
        evaluations=evaluations,
        mlp_evaluations=mlp_evaluations,
        groups=_read_groups(record, config),
        collectives=traffic.collectives,
        bytes_sent=traffic.bytes,
        is_forced=_is_forced(call, trajectory),
        refused_error=() if branch else _refused_error(call, trajectory, config),
    )


def _is_forced(call: TimedCall, trajectory: Trajectory) -> bool:
    """Whether a step was computed whatever was seen; of steps before noise levels were edited nobody knows any more."""
    position = call.step - trajectory.first_index
    return position >= 0 and bool(trajectory.schedule[position].is_forced)


def _refused_error(call: TimedCall, trajectory: Trajectory, config: CacheConfig) -> tuple[float, ...]:
    """What the estimate would have come to where a step was refreshed: as the leading branch, whose call it is, reckons it."""
    if call.record is None:
        return ()
    near = [other for other in trajectory.calls if other.step in (call.step - 1, call.step)]
    records = {(other.step, branch): other.record for other, branch in _in_order(near) if other.record is not None}
    branches = [branch for step, branch in records if step == call.step]
    before = records.get((call.step - 1, 0))
    unknown = torch.full_like(call.record.predicted_error, math.nan)
    is_alike = branches == [branch for step, branch in records if step == call.step - 1] == [*range(len(trajectory.present))]
    if before is None or not is_alike or trajectory.bound.parallel is not None:
        return _floats(unknown)
    own, *others = (records[call.step, branch] for branch in branches)
    error = own.predicted_error
    if others:
        scale = unknown if trajectory.guidance.scale is None else trajectory.guidance.scale
        weight, others_weight = weigh(scale, config=config)
        error = weight * error + others_weight * sum(other.predicted_error for other in others)
    sigma, sigma_next = trajectory.sigmas[call.step], trajectory.sigmas[call.step + 1]
    added = error_control.contribution(error, sigma, sigma_next, weight=config.error_weight, early_weight=config.early_weight)
    return _floats(torch.where(call.record.refresh, before.accumulated_error + added, unknown))


def _count(record: StepRecord | None, is_computed: bool, num_blocks: int, config: CacheConfig) -> tuple[int, int]:
    """Blocks that ran, and blocks whose MLPs alone ran."""
    if record is None:
        return num_blocks, 0
    if isinstance(record.groups, GroupRecord):
        lengths = [part.stop - part.start for part in divide(num_blocks, config.num_groups)]
        flags = (record.groups.is_computed.tolist(), record.groups.is_partial.tolist())
        computed, partial = (sum(n for n, ran in zip(lengths, which, strict=True) if ran) for which in flags)
        return computed, partial
    # At a refresh the last blocks run twice: on the forecast, to measure its error, and on what was computed.
    return (num_blocks + config.last_blocks if is_computed else config.first_blocks + config.last_blocks), 0


def _read_groups(record: StepRecord | None, config: CacheConfig) -> tuple[GroupReport, ...]:
    if record is None or not isinstance(record.groups, GroupRecord):
        return ()
    found, groups = record.groups, []
    for index in range(config.num_groups):
        groups.append(
            GroupReport(
                choice=tuple("computed" if c == 0 else STRATEGIES[c - 1].name for c in found.choice[index].tolist()),
                distance=_floats(found.distance[index]),
                threshold=_floats(found.threshold[index]),
                stability=_floats(found.stability[index]),
                stability_class=tuple(found.stability_class[index].tolist()),
            )
        )
    return tuple(groups)


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.to(torch.float64).tolist())
