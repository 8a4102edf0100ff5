"""compile_pipeline under true CFG: the scale that it finds, and one decision for both branches."""

import math

import numpy as np
import pytest
import torch

import afcache
from tests.support.sampling import RESIDUAL, compiled, sample

pytestmark = pytest.mark.host


def test_guidance_is_unknown_when_a_callback_changes_the_first_latents(pipe):
    def disturb(_pipe, step: int, _timestep, arguments: dict):
        if step == 0:
            arguments["latents"] = arguments["latents"] + 0.1 * torch.randn_like(arguments["latents"])
        return arguments

    sample(compiled(pipe), cfg=2.0, callback_on_step_end=disturb)
    report = afcache.report(pipe)
    assert math.isnan(report.guidance_scale[0])
    assert "true CFG scale unknown" in str(report)
    assert set(report.pattern()) == {"F", "."}


@pytest.mark.parametrize("scale", [2.0, 4.0])
def test_guidance_scale_is_found_and_branches_decide_together(pipe, scale: float):
    sample(compiled(pipe), cfg=scale)
    report = afcache.report(pipe)
    assert report.guidance_scale == pytest.approx((scale,), rel=1e-3)
    assert report.pattern(0) == report.pattern(1)
    assert len(report.steps) == 56


def test_guidance_weighs_the_errors_of_both_branches(pipe):
    """Of residuals the leader's estimate is |s| e_c + |1 - s| e_u times the step, recomputed from the record."""
    sample(compiled(pipe, RESIDUAL), cfg=4.0)
    steps = afcache.report(pipe).steps
    sigmas = pipe.scheduler.sigmas.tolist()
    total, checked = 0.0, 0
    for leader, follower in zip(steps[::2], steps[1::2], strict=True):
        if leader.is_computed:
            total = 0.0
            continue
        i = leader.step
        e_c, e_u = leader.predicted_error[0], follower.predicted_error[0]
        total += (4.0 * e_c + 3.0 * e_u) * abs(sigmas[i + 1] - sigmas[i])
        assert leader.estimated_error[0] == pytest.approx(total, rel=1e-3)
        assert follower.estimated_error == leader.estimated_error
        checked += 1
    assert checked > 5


def test_guidance_can_change_between_images(pipe):
    compiled(pipe)
    first = sample(pipe, cfg=2.0)
    sample(pipe)
    assert afcache.report(pipe).guidance_scale == ()
    sample(pipe, cfg=4.0)
    assert np.array_equal(sample(pipe, cfg=2.0), first)
