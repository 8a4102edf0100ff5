"""Reports: what they count, say and draw."""

import dataclasses
import json
import math

import pytest
from matplotlib.figure import Figure

import afcache
from afcache import CacheConfig
from afcache.reports.plots import draw_errors, draw_estimate, refused_estimates
from afcache.reports.summary import Report, StepReport
from tests.support.sampling import sample


def step(
    index: int, *, computed: bool, refreshed: tuple[bool, ...] = (), estimated: float = 0.0, branch: int = 0
) -> StepReport:
    refreshed = refreshed or (computed,)
    return StepReport(
        step=index,
        branch=branch,
        sigma=1 - index / 4,
        refreshed=refreshed,
        is_computed=computed,
        predicted_error=(0.01,),
        measured_error=(0.02 if computed else math.nan,),
        estimated_error=(estimated,),
        seconds=0.4 if computed else 0.1,
        evaluations=12 if computed else 0,
    )


def make_report(*steps: StepReport) -> Report:
    return Report(CacheConfig().to_dict(), steps, len(steps), 12, 1024, ())


FOUR = make_report(
    step(0, computed=True),
    step(1, computed=True, refreshed=(True, False)),
    step(2, computed=False, estimated=0.003),
    step(3, computed=False, estimated=0.007),
)


def test_counts_are_those_of_the_blocks_that_ran():
    assert FOUR.pattern() == "Fm.."
    assert FOUR.block_evaluations == 24
    assert FOUR.block_evaluations_uncached == 48
    assert FOUR.block_speedup == 2.0
    assert FOUR.seconds(is_computed=True) == 0.4
    assert FOUR.seconds(is_computed=False) == 0.1


def test_text_tells_the_story():
    text = str(FOUR)
    assert "24 of 48 evaluations ran: 2.00x fewer" in text
    assert "0.0070 at most between refreshes" in text
    assert "m computed for some samples" in text


def test_json_has_no_nan(tmp_path):
    FOUR.to_json(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text
    loaded = json.loads(text)
    assert loaded["pattern"] == "Fm.."
    assert loaded["steps"][2]["measured_error"] == [None]


def test_plot_writes_a_picture(tmp_path):
    FOUR.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 5000


def test_the_plot_keeps_what_is_estimated_and_what_is_measured_apart():
    """Relative errors are larger than any tolerance: on one axis they would look as if it were crossed."""
    estimate, errors = Figure().subplots(2, 1)
    draw_estimate(estimate, FOUR, list(FOUR.steps))
    draw_errors(errors, list(FOUR.steps))
    accumulated, *_ = estimate.containers
    assert [bar.get_height() for bar in accumulated] == [0.0, 0.0, 0.003, 0.007]
    assert [line.get_label() for line in estimate.lines] == ["tolerance 0.016"]
    assert estimate.lines[0].get_ydata()[0] == 0.016 > max(bar.get_height() for bar in accumulated)
    assert [line.get_label() for line in errors.lines] == ["predicted for the forecast", "measured at a refresh"]
    assert errors.get_yscale() == "log"


def test_what_computed_steps_would_have_come_to_is_drawn_hollow():
    steps = [
        step(0, computed=True),
        step(1, computed=False, estimated=0.0025),
        dataclasses.replace(step(2, computed=True), refused_error=(0.005, 0.017)),
        dataclasses.replace(step(2, computed=True, branch=1), refused_error=()),
        dataclasses.replace(step(3, computed=True), refused_error=(math.nan,)),
    ]
    assert refused_estimates(make_report(*steps)) == {2: 0.017}
    estimate = Figure().subplots()
    draw_estimate(estimate, dataclasses.replace(make_report(*steps), tolerance_scale=2.0), steps)
    assert [line.get_label() for line in estimate.lines] == ["tolerance 0.016, with 5 steps 0.032"]
    assert max(estimate.lines[0].get_ydata()) == 0.032  # pyright: ignore[reportArgumentType]


def test_plots_without_an_estimate_say_so():
    blank = [
        dataclasses.replace(step(i, computed=True), predicted_error=(math.nan,), measured_error=(math.nan,)) for i in range(3)
    ]
    estimate, errors = Figure().subplots(2, 1)
    draw_estimate(estimate, make_report(*blank), blank)
    draw_errors(errors, blank)
    assert [text.get_text() for axes in (estimate, errors) for text in axes.texts] == ["no estimate", "nothing was forecast"]


def test_plot_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="report is empty: run the pipeline before plotting"):
        make_report().plot(tmp_path / "report.png")


@pytest.mark.host
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_fixed_policy_says_what_it_does(pipe, tmp_path, cfg: float):
    config = CacheConfig(policy="fixed", forecast="taylorseer", interval=5, correction=False)
    sample(afcache.compile_pipeline(pipe, config, compile=False), cfg=cfg, steps=14)
    report = afcache.report(pipe)
    assert report.pattern() == "FFF" + "....F" * 2 + "."
    assert "a refresh every 5 steps, taylorseer forecast of order 1" in str(report)
    assert "tolerance" not in str(report)
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 5000


@pytest.mark.host
def test_report_agrees_with_the_blocks_that_really_ran(pipe):
    """Counted independently, by hooks on submodules that our forward calls once per block evaluation."""
    calls = []
    transformer = pipe.transformer
    modules = [block.norm1 for block in transformer.transformer_blocks]
    modules += [block.norm for block in transformer.single_transformer_blocks]
    handles = [module.register_forward_hook(lambda *_: calls.append(1)) for module in modules]
    afcache.compile_pipeline(pipe, CacheConfig(tolerance=0.02), compile=False)
    for cfg in (1.0, 2.0):
        calls.clear()
        sample(pipe, cfg=cfg)
        report = afcache.report(pipe)
        assert report.block_evaluations == len(calls)
        assert 0 < len(calls) < report.block_evaluations_uncached
    for handle in handles:
        handle.remove()


@pytest.mark.host
def test_report_of_policy_none_counts_everything(pipe):
    afcache.compile_pipeline(pipe, CacheConfig(policy="none"), compile=False)
    sample(pipe, steps=4)
    report = afcache.report(pipe)
    assert report.pattern() == "FFFF"
    assert report.block_speedup == 1.0
    assert "policy none" in str(report)
