"""Callers who leave the trajectory: their images are right, and the report says what happened."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import afcache
from afcache.calibration.metrics import psnr
from bench.jumps import jump
from tests.support.leaps import PROMPTS, STEPS, Loop, at_step, embedded, fresh_like, latents_quality, prepared
from tests.support.sampling import ADAPTIVE, sample

pytestmark = pytest.mark.host

MODES = {"in the graph": {}, "decided ahead": {"decide_ahead": True}, "residuals": {"config": afcache.policy("residual")}}


def quality(images: np.ndarray, reference: np.ndarray) -> float:
    """Mean PSNR."""
    return float(np.mean([psnr(one, other) for one, other in zip(images, reference, strict=True)]))


def drawn_both_ways(own: Any, draw: Callable[[Any], np.ndarray], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Without a cache, and with one."""
    plain = draw(own)
    return plain, draw(afcache.compile_pipeline(own, compile=False, **options))


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("mode", MODES)
def test_other_latents_in_a_callback_begin_anew(own, mode: str, cfg: float):
    undisturbed = quality(*drawn_both_ways(own, lambda pipe: sample(pipe, 1, cfg=cfg, prompt=PROMPTS[0]), **MODES[mode]))
    afcache.restore_pipeline(own)
    leap = at_step(6, fresh_like)
    images = drawn_both_ways(own, lambda pipe: sample(pipe, 1, cfg=cfg, prompt=PROMPTS[0], **leap), **MODES[mode])
    assert quality(*images) > min(undisturbed - 1, 50)
    report = afcache.report(own)
    assert [(each.step, each.reason, each.samples) for each in report.restarts] == [(7, "latents", (0,))]
    assert report.pattern()[7] == "F"
    assert "." in report.pattern()[8:]
    assert "restarted  latents: at step 7" in str(report)


@pytest.mark.parametrize("mode", MODES)
def test_images_of_a_batch_that_change_places_begin_anew(own, mode: str):
    four = {"seed": [1, 2, 3, 4], "prompt": [PROMPTS[0]] * 4}
    undisturbed = quality(*drawn_both_ways(own, lambda pipe: sample(pipe, **four), **MODES[mode]))
    afcache.restore_pipeline(own)
    swap = at_step(10, lambda latents: latents.flip(0))
    images = drawn_both_ways(own, lambda pipe: sample(pipe, **four, **swap), **MODES[mode])
    assert quality(*images) > undisturbed - 1
    assert [(each.step, each.samples) for each in afcache.report(own).restarts] == [(11, (0, 1, 2, 3))]


def test_one_image_of_a_batch_begins_anew_alone(own):
    def change(latents: Tensor) -> Tensor:
        return torch.stack([latents[0], fresh_like(latents[1])])

    plain, cached = drawn_both_ways(own, lambda pipe: sample(pipe, [1, 2], prompt=PROMPTS, **at_step(6, change)))
    restarts = afcache.report(own).restarts
    assert [(each.step, each.reason, each.samples) for each in restarts] == [(7, "latents", (1,))]
    assert "latents: at step 7 (images 1)" in str(afcache.report(own))
    calm = sample(own, [1, 2], prompt=PROMPTS)
    assert np.array_equal(calm[0], cached[0])
    assert psnr(plain[1], cached[1]) > 40


@pytest.mark.parametrize(("lengths", "restarts"), [(1.9, []), (2.1, [11])])
def test_two_lengths_of_the_step_are_what_a_forecast_bears(own, lengths: float, restarts: list[int]):
    four = {"seed": [1, 2, 3, 4], "prompt": [PROMPTS[0]] * 4}
    calm = quality(*drawn_both_ways(own, lambda pipe: sample(pipe, **four)))
    afcache.restore_pipeline(own)

    def draw(pipe: Any) -> np.ndarray:
        move = jump(lengths, 0)
        return sample(pipe, **four, callback_on_step_end=move, callback_on_step_end_tensor_inputs=["latents"])

    images = drawn_both_ways(own, draw)
    assert [each.step for each in afcache.report(own).restarts] == restarts
    assert quality(*images) > calm - 1


def test_a_loop_by_hand_that_leaves_out_steps_begins_anew(own):
    def draw(pipe: Any, *, leaps: bool) -> Tensor:
        inputs = embedded(pipe)
        loop = Loop(pipe, prepared(pipe), 1, **inputs)
        for index in range(10 if leaps else STEPS):
            loop.step(index)
        if leaps:
            loop.latents = Loop(pipe, pipe.scheduler, 2, **inputs).latents * pipe.scheduler.sigmas[12]
            for index in range(12, STEPS):
                loop.step(index)
        return loop.latents

    plain = {leaps: draw(own, leaps=leaps) for leaps in (False, True)}
    afcache.compile_pipeline(own, compile=False)
    qualities = {leaps: latents_quality(draw(own, leaps=leaps), plain[leaps]) for leaps in (False, True)}
    assert qualities[True] > qualities[False] - 1
    report = afcache.report(own)
    assert [(each.step, each.reason) for each in report.restarts] == [(12, "steps")]
    assert report.steps[0].step == 12
    assert "." in report.pattern()


@pytest.mark.parametrize("indices", [range(0, 28, 1), range(0, 28, 3), [20] * 12, range(27, -1, -1)], ids=str)
def test_calls_with_unrelated_latents_are_exact(own, indices):
    inputs = embedded(own)
    prepared(own)
    loops = [Loop(own, own.scheduler, 100 + number, **inputs) for number, _ in enumerate(indices)]
    exact = [loop.velocity(index) for loop, index in zip(loops, indices, strict=True)]
    afcache.compile_pipeline(own, compile=False)
    for loop, index, expected in zip(loops, indices, exact, strict=True):
        torch.testing.assert_close(loop.velocity(index), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_place", [True, False])
def test_noise_levels_edited_in_a_callback_are_seen(own, in_place: bool):
    def edit(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        del timestep, kwargs
        if index == 9:
            sigmas = pipe.scheduler.sigmas if in_place else pipe.scheduler.sigmas.clone()
            sigmas[12:-1] *= 0.9
            pipe.scheduler.sigmas = sigmas
        return {}

    plain, cached = drawn_both_ways(own, lambda pipe: sample(pipe, 1, prompt=PROMPTS[0], callback_on_step_end=edit))
    report = afcache.report(own)
    assert [(each.step, each.reason) for each in report.restarts] == [(10, "schedule")]
    assert report.num_steps == STEPS
    assert psnr(plain[0], cached[0]) > 44


def test_no_new_graph_for_a_leap(short):
    afcache.compile_pipeline(short, ADAPTIVE, backend="aot_eager")
    for cfg in (1.0, 3.0):
        sample(short, 1, cfg=cfg, prompt=PROMPTS[0], steps=12)
        sample(short, 1, cfg=cfg, prompt=PROMPTS[0], steps=12, **at_step(5, fresh_like))
        assert [each.step for each in afcache.report(short).restarts] == [6]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
