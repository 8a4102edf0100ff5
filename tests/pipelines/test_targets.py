"""compile_pipeline with what the model returns as target: images, guidance of every kind, one graph."""

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import afcache
from afcache.calibration.metrics import psnr
from afcache.settings.presets import tuned
from tests.support.sampling import PROMPT, compiled, largest_difference, sample

pytestmark = pytest.mark.host
VELOCITY, NOISE = tuned(0.016, target="velocity"), tuned(0.016, target="noise")
TARGETS = pytest.mark.parametrize("config", [VELOCITY, NOISE], ids=lambda config: config.target)


@TARGETS
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_images_are_close_and_steps_are_saved(pipe, config: afcache.CacheConfig, cfg: float):
    expected = sample(pipe, 3, cfg=cfg)
    image = sample(compiled(pipe, config), 3, cfg=cfg)
    assert psnr(image, expected) > 35
    assert afcache.report(pipe).pattern().count("F") <= 12


@TARGETS
def test_tolerance_zero_is_the_uncached_image(pipe, config: afcache.CacheConfig):
    expected = sample(pipe, cfg=2.0)
    image = sample(compiled(pipe, dataclasses.replace(config, tolerance=0.0)), cfg=2.0)
    assert largest_difference(image, expected) < 1e-4


@TARGETS
def test_a_cached_step_runs_nothing_of_the_model(pipe, config: afcache.CacheConfig):
    calls: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda module, arguments, name=name: calls.append(name))
        for name, module in pipe.transformer.named_modules()
        if name in ("x_embedder", "time_text_embed", "context_embedder", "norm_out", "proj_out")
    ]
    sample(compiled(pipe, config))
    for handle in handles:
        handle.remove()
    refreshes = afcache.report(pipe).pattern().count("F")
    assert refreshes < 28
    assert len(calls) == 5 * refreshes


def test_everything_is_one_graph(short):
    """Guidance on and off, step counts, decisions: one graph, no break, the eager step's image and decisions."""
    runs: list[dict[str, Any]] = [{"steps": 28}, {"steps": 20, "cfg": 2.0}, {"steps": 20, "seed": 5}]
    compiled(short, NOISE)
    expected = []
    for options in runs:
        latents = sample(short, **options, output_type="latent")
        expected.append((latents, afcache.report(short).pattern()))
    afcache.compile_pipeline(short, NOISE, backend="aot_eager")
    for options, (latents, pattern) in zip(runs, expected, strict=True):
        assert largest_difference(sample(short, **options, output_type="latent"), latents) < 1e-4
        assert afcache.report(short).pattern() == pattern
        assert set(pattern) == {"F", "."}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_under_autocast_a_step_is_one_graph_too(short):
    """The model answers in bfloat16, and latents are float32: both sides of a branch are of one dtype."""
    config = dataclasses.replace(NOISE, tolerance=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        expected = sample(short, cfg=2.0, steps=20)
        afcache.compile_pipeline(short, config, backend="aot_eager")
        image = sample(short, cfg=2.0, steps=20)
    assert {"F", "."} <= set(afcache.report(short).pattern())
    assert psnr(image, expected) > 25


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize(("name", "is_left"), [("noise", False), ("noise", True), ("residual", False)])
def test_autocast_that_changes_within_an_image_is_heeded_by_what_is_compiled(short, name: str, is_left: bool):
    """The eager image. With residuals the model itself refuses the bfloat16 latents that are left, as without a cache."""

    def draw(**options: Any) -> Any:
        afcache.compile_pipeline(short, afcache.policy(name, tolerance=0.01), **options)
        with contextlib.ExitStack() as stack:
            if is_left:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))

            def change(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
                del pipe, timestep
                if step == 5 and is_left:
                    stack.close()
                elif step == 5:
                    stack.enter_context(torch.autocast("cpu", torch.bfloat16))
                return values

            image = sample(short, steps=10, callback_on_step_end=change)
        assert {"F", "."} <= set(afcache.report(short).pattern())
        return image

    plain = draw(compile=False)
    assert largest_difference(draw(backend="aot_eager"), plain) < 1e-4


def test_decisions_made_ahead_are_the_same(pipe):
    expected = sample(compiled(pipe, NOISE), cfg=2.0)
    pattern = afcache.report(pipe).pattern()
    ahead = sample(compiled(pipe, NOISE, decide_ahead=True), cfg=2.0)
    assert afcache.report(pipe).pattern() == pattern
    assert np.array_equal(ahead, expected)


def test_the_leader_decides_by_the_guided_error(pipe):
    """Its estimate sums what the second branch expects: no |s| e_1 + |1 - s| e_2."""
    sample(compiled(pipe, dataclasses.replace(NOISE, error_weight=0.0, early_weight=0.0)), cfg=4.0)
    report = afcache.report(pipe)
    assert report.guidance_scale == pytest.approx((4.0,), rel=1e-3)
    assert report.pattern(0) == report.pattern(1)
    sigmas, total, checked = pipe.scheduler.sigmas.tolist(), 0.0, 0
    for leader, follower in zip(report.steps[::2], report.steps[1::2], strict=True):
        if leader.is_computed:
            total = 0.0
            continue
        total += follower.predicted_error[0] * abs(sigmas[leader.step + 1] - sigmas[leader.step])
        assert leader.estimated_error[0] == pytest.approx(total, rel=1e-3)
        checked += 1
    assert checked > 5


def test_the_guided_error_saves_steps(pipe):
    """The bound of a scale of 4 asks for more refreshes than the error that it bounds."""
    sample(compiled(pipe, tuned(0.016, target="residual")), cfg=4.0)
    bounded = afcache.report(pipe).pattern().count("F")
    sample(compiled(pipe, VELOCITY), cfg=4.0)
    assert afcache.report(pipe).pattern().count("F") < bounded


@torch.no_grad()
def draw_within(pipe: Any, guided: Sequence[int], *, thrice: Sequence[int] = (), scale: float = 2.0, steps: int = 28) -> Tensor:
    """A loop by hand with guidance at some steps alone, and a third branch at some of those."""
    arguments = {"prompt_2": None, "max_sequence_length": 16, "device": "cpu"}
    prompt, pooled, txt_ids = pipe.encode_prompt(PROMPT, **arguments)
    negative, negative_pooled, _ = pipe.encode_prompt("", **arguments)
    third, third_pooled, _ = pipe.encode_prompt("a handwritten three on a palace", **arguments)
    channels = pipe.transformer.config.in_channels // 4
    latents, img_ids = pipe.prepare_latents(1, channels, 32, 32, torch.float32, "cpu", torch.Generator().manual_seed(0), None)
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=0.5)
    guidance = torch.full((1,), 3.5) if pipe.transformer.config.guidance_embeds else None
    for index, timestep in enumerate(pipe.scheduler.timesteps):
        common = {"hidden_states": latents, "timestep": timestep.expand(1) / 1000, "guidance": guidance, "img_ids": img_ids}

        def velocity_of(states: Tensor, vector: Tensor, common: dict[str, Any] = common) -> Tensor:
            texts = {"encoder_hidden_states": states, "pooled_projections": vector, "txt_ids": txt_ids}
            return pipe.transformer(**common, **texts, return_dict=False)[0]

        velocity = velocity_of(prompt, pooled)
        if index in guided:
            other = velocity_of(negative, negative_pooled)
            away = velocity - velocity_of(third, third_pooled) if index in thrice else 0.0
            velocity = other + scale * (velocity - other) + 0.2 * away
        latents = pipe.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


@TARGETS
@pytest.mark.parametrize("guided", [range(12), range(6, 28), range(6, 18), range(28)], ids=str)
def test_guidance_may_come_and_go(pipe, config: afcache.CacheConfig, guided: range):
    expected = draw_within(pipe, guided)
    latents = draw_within(compiled(pipe, config), guided)
    steps = afcache.report(pipe).steps
    assert afcache.report(pipe).guidance_scale == pytest.approx((2.0,), rel=1e-3)
    assert float((latents - expected).norm() / expected.norm()) < 0.06
    second = [step for step in steps if step.branch == 1]
    assert [step.step for step in second] == list(guided)
    # It has nothing to forecast from when it comes, whatever the other decided.
    assert second[0].is_computed
    assert sum(step.is_computed for step in steps) < 0.7 * len(steps)


@pytest.mark.parametrize("thrice", [range(28), range(6, 28), range(4, 16)], ids=str)
def test_a_third_branch_is_told_from_the_pair(pipe, thrice: range):
    """No scale of two branches explains it: each one's own error counts, and all decide as the first does."""
    expected = draw_within(pipe, range(28), thrice=thrice)
    latents = draw_within(compiled(pipe, NOISE), range(28), thrice=thrice)
    report = afcache.report(pipe)
    assert report.guidance_scale == (() if thrice.stop == 28 else pytest.approx((2.0,), rel=1e-3))
    assert float((latents - expected).norm() / expected.norm()) < 0.06
    third = [step for step in report.steps if step.branch == 2]
    assert [step.step for step in third] == list(thrice)
    assert third[0].is_computed
    assert all(report.pattern(0)[step.step] == "F" or not step.is_computed for step in third[1:])
    assert report.pattern(0).count("F") < 24


def test_guidance_that_comes_back_starts_again(pipe):
    """What a branch remembers of steps long past is no history."""
    guided = [*range(8), *range(16, 28)]
    expected = draw_within(pipe, guided)
    latents = draw_within(compiled(pipe, NOISE), guided)
    assert float((latents - expected).norm() / expected.norm()) < 0.05
    second = {step.step: step for step in afcache.report(pipe).steps if step.branch == 1}
    assert second[16].is_computed
    assert all(late - early == 1 for early, late in itertools.pairwise(sorted(second)) if early != 7)


@pytest.mark.parametrize("guided", [range(10), range(6, 18), [*range(8), *range(16, 28)]], ids=str)
def test_decisions_made_ahead_know_that_guidance_came_or_went(pipe, guided: Sequence[int]):
    """Nothing but the tolerance would refresh: what was foreseen for other branches, or by errors that count no more, shows."""
    config = dataclasses.replace(NOISE, max_growth=float("inf"), tolerance=0.05)
    expected = draw_within(compiled(pipe, config), guided)
    pattern = afcache.report(pipe).pattern()
    ways: list[dict[str, Any]] = [{"compile": False, "decide_ahead": True}, {"compile": "blocks", "backend": "eager"}]
    for options in ways:
        afcache.compile_pipeline(pipe, config, **options)
        torch.testing.assert_close(draw_within(pipe, guided), expected, rtol=1e-4, atol=1e-4)
        assert afcache.report(pipe).pattern() == pattern
