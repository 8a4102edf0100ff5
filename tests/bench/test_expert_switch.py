"""The ways of `bench.expert_switch`."""

import json

import numpy as np
import pytest

from afcache.settings.presets import tuned
from bench.expert_switch import draw, evaluate, join, load, planned, switch_of
from bench.mini_wan.parts import EXPERTS


def test_a_plan_is_what_was_computed_and_the_switch():
    plan = planned("FF..F..F.F", 5)
    assert (plan.warmup_steps, plan.refresh_steps) == (2, (4, 5, 7, 9))
    assert planned("FFF.....FF", 2).refresh_steps == (8, 9)


@pytest.mark.host
def test_both_experts_behind_one_forward_draw_what_they_draw_apart():
    settings = {**json.loads((EXPERTS / "recommended.json").read_text()), "num_inference_steps": 12}
    pipe = load()
    one = join(pipe)
    assert 0 < switch_of(pipe, settings) < 12
    reference = draw(pipe, 0, settings)
    assert np.array_equal(draw(one, 0, settings), reference)
    whole = evaluate(one, lambda _: tuned(0.0, target="noise"), {0: reference}, **settings)
    assert (whole.speed, whole.psnr) == (1.0, (150.0,))
    # Apart, the second expert's first steps are computed.
    some = tuned(0.05, target="noise")
    apart, together = (evaluate(each, lambda _: some, {0: reference}, **settings) for each in (pipe, one))
    assert 1 < apart.speed <= together.speed
