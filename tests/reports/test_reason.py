"""Why nothing was saved: told of what a run recorded, and true."""

import dataclasses
import math
import re

import pytest

import afcache
from afcache import CacheConfig
from afcache.reports.reason import allowing_tolerance, reasons_of, why_nothing_was_saved
from afcache.reports.summary import Report, StepReport
from tests.support.sampling import compiled, sample

PRESET = afcache.PRESETS["balanced"]


def step(index: int, **changes: object) -> StepReport:
    """A computed step of one image, which the tolerance refused unless told otherwise."""
    before = StepReport(
        step=index,
        branch=0,
        sigma=1 - index / 8,
        refreshed=(True,),
        is_computed=True,
        predicted_error=(math.inf if index < 2 else 0.1,),
        measured_error=(0.1,),
        estimated_error=(0.0,),
        seconds=0.1,
        evaluations=12,
        is_forced=index < 2,
        refused_error=(0.02,),
    )
    return dataclasses.replace(before, **changes)  # pyright: ignore[reportArgumentType]


def report_of(*steps: StepReport, scale: float = 1.0, **settings: object) -> Report:
    return Report({**PRESET.to_dict(), **settings}, steps, len(steps), 12, 1024, (), tolerance_scale=scale)


START = (step(0), step(1))


@pytest.mark.parametrize(
    ("last", "reason", "said"),
    [
        ({}, "tolerance", "1 expected to reach the tolerance.\n  A tolerance of about 0.021 would have let one be forecast"),
        ({"is_forced": True}, "forced", "of 3 steps 3 always computed.\n  More steps"),
        ({"predicted_error": (math.inf,)}, "restarted", "1 after a new start"),
        ({"predicted_error": (math.nan,)}, "broken", "1 with an error that is no number.\n  The model returned"),
        ({"sigma": 0.5, "refused_error": (0.001,)}, "growth", "1 too far from the last refresh (max_growth).\n  A larger"),
        ({"refused_error": (math.nan,)}, "unknown", "1 for what was not recorded"),
    ],
)
def test_each_reason_is_told(last: dict[str, object], reason: str, said: str):
    report = report_of(*START, step(2, **last))
    assert reasons_of(report) == {0: "forced", 1: "forced", 2: reason}
    assert said in str(report)


def test_the_second_step_of_a_warmup_of_one_is_always_computed():
    report = report_of(step(0), step(1, is_forced=False), step(2))
    assert reasons_of(report)[1] == "forced"


def test_a_step_that_only_some_images_need_is_told_as_such():
    pair = {"refreshed": (True, False), "predicted_error": (0.1, 0.1), "refused_error": (0.02, math.nan)}
    start = [dataclasses.replace(each, refreshed=(True, True)) for each in START]
    report = report_of(*start, step(2, **pair))
    assert reasons_of(report)[2] == "batch"
    assert "1 asked for by some images alone.\n  Drawn alone some of these images save" in why_nothing_was_saved(report)
    together = {**pair, "refreshed": (True, True), "refused_error": (0.02, 0.001)}
    shared = report_of(*start, step(2, **together), batch_decisions="shared")
    assert reasons_of(shared)[2] == "tolerance"


def test_the_tolerance_that_would_do_is_the_least_of_the_largest_in_two_digits():
    refused = (
        step(2, refused_error=(0.0201, 0.0312)),
        step(3, refused_error=(0.0254, 0.01)),
        step(4, refused_error=(0.01, 0.03)),
    )
    report = report_of(*START, *refused)
    reasons = {0: "forced", 1: "forced", 2: "tolerance", 3: "tolerance", 4: "growth"}
    assert allowing_tolerance(report, reasons) == pytest.approx(0.026)
    assert allowing_tolerance(dataclasses.replace(report, tolerance_scale=2.0), reasons) == pytest.approx(0.013)
    assert math.isnan(allowing_tolerance(report, {2: "growth"}))
    # A number that has two digits already is no limit: the estimate must stay below it.
    assert allowing_tolerance(report_of(*START, step(2)), {2: "tolerance"}) == pytest.approx(0.021)


def test_policies_without_a_tolerance_say_which_they_are():
    report = report_of(*START, policy="fixed", interval=1)
    assert why_nothing_was_saved(report) == "Nothing was saved: policy 'fixed' computed every step."


@pytest.mark.host
@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize(("steps", "tolerance"), [(4, 0.0025), (6, 0.00075), (8, 0.00075)])
def test_the_tolerance_that_is_told_forecasts(pipe, cfg: float, steps: int, tolerance: float):
    config = dataclasses.replace(PRESET, tolerance=tolerance)
    sample(compiled(pipe, config), cfg=cfg, steps=steps)
    said = str(afcache.report(pipe))
    assert f"of {steps} steps 3 always computed, {steps - 3} expected to reach the tolerance." in said
    (number,) = re.findall(r"A tolerance of about (\S+) would", said)
    for other, is_enough in ((float(number), True), (0.9 * float(number), False)):
        sample(compiled(pipe, dataclasses.replace(config, tolerance=other)), cfg=cfg, steps=steps)
        assert ("." in afcache.report(pipe).pattern()) == is_enough


@pytest.mark.host
@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("target", ["noise", "residual"])
@pytest.mark.parametrize("steps", [9, 20])
def test_every_computed_step_has_a_reason_that_is_recorded(pipe, cfg: float, target: str, steps: int):
    """The estimates that the report makes anew are those that decided, of all guidance branches together."""
    sample(compiled(pipe, afcache.policy(target, tolerance=0.008)), cfg=cfg, steps=steps)  # pyright: ignore[reportArgumentType]
    report = afcache.report(pipe)
    reasons = reasons_of(report)
    assert {*reasons} == {index for index, mark in enumerate(report.pattern()) if mark == "F"}
    assert {*reasons.values()} <= {"forced", "tolerance", "growth"}
    assert "tolerance" in reasons.values()
    for each in report.steps:
        assert each.branch or each.is_computed or math.isnan(each.refused_error[0])


@pytest.mark.host
def test_few_steps_are_told_with_the_tolerance_that_they_have(pipe):
    sample(compiled(pipe, PRESET), steps=8)
    assert "at most between refreshes (tolerance 0.01, with 8 steps 0.02)" in str(afcache.report(pipe))
    assert afcache.report(pipe).tolerance_scale == 2.0
    sample(compiled(pipe, CacheConfig(policy="fixed", interval=3)), steps=8)
    assert afcache.report(pipe).tolerance_scale == 1.0


@pytest.mark.host
def test_images_that_ask_in_turns_are_told(pipe):
    prompts = ["a handwritten two on a palace"] * 8
    sample(compiled(pipe, afcache.PRESETS["quality"]), list(range(8)), prompt=prompts, steps=8)
    report = afcache.report(pipe)
    assert report.block_speedup == 1.0
    assert "m" in report.pattern()
    assert "asked for by some images alone" in str(report)
