"""compile_pipeline on mini-FLUX: the same images as without it, in every order of events."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)

import afcache
from afcache import CacheConfig
from tests.support.mini_flux import fresh_mini_flux
from tests.support.sampling import ADAPTIVE, PROMPT, RESIDUAL, compiled, largest_difference, sample

pytestmark = pytest.mark.host


@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("config", [CacheConfig(tolerance=0.0), CacheConfig(policy="none")], ids=["tolerance 0", "none"])
def test_tolerance_zero_and_policy_none_equal_the_uncached_pipeline(pipe, config: CacheConfig, cfg: float):
    expected = sample(pipe, cfg=cfg)
    image = sample(compiled(pipe, config), cfg=cfg)
    assert largest_difference(image, expected) < 1e-4
    assert afcache.report(pipe).pattern() == "F" * 28


@pytest.mark.parametrize("cfg", [1.0, 2.0, 4.0])
def test_adaptive_policy_computes_less_and_stays_close(pipe, cfg: float):
    expected = sample(pipe, cfg=cfg)
    image = sample(compiled(pipe), cfg=cfg)
    report = afcache.report(pipe)
    assert {"F", "."} == set(report.pattern())
    assert report.block_speedup > 2
    assert 30 < afcache.psnr(image, expected) < 100


def test_restored_pipeline_is_bit_identical(pipe):
    expected = sample(pipe)
    before = dict(pipe.transformer.__dict__)
    sample(compiled(pipe))
    assert afcache.restore_pipeline(pipe) is pipe
    assert np.array_equal(sample(pipe), expected)
    assert pipe.transformer.__dict__.keys() == before.keys()


def decision_margin(pipe) -> float:
    """How far the nearest decision was from turning over, relative to the tolerance or the growth limit."""
    report = afcache.report(pipe)
    tolerance, max_growth = report.config["tolerance"], report.config["max_growth"]
    sigmas = pipe.scheduler.sigmas.tolist()
    refreshes, margins = [0, 1], []
    total = 0.0
    for step in report.steps[2:]:
        i = step.step
        total += step.predicted_error[0] * abs(sigmas[i + 1] - sigmas[i])
        growth = (sigmas[refreshes[-1]] - sigmas[i]) / (sigmas[refreshes[-2]] - sigmas[refreshes[-1]])
        near_tolerance, near_growth = abs(total / tolerance - 1), abs(growth / max_growth - 1)
        exceeds = (total >= tolerance, growth > max_growth)
        assert any(exceeds) == step.is_computed
        # A refresh for both reasons is as safe as the safer one.
        margins.append(max(near_tolerance, near_growth) if all(exceeds) else min(near_tolerance, near_growth))
        if step.is_computed:
            refreshes.append(i)
            total = 0.0
    return min(margins)


def test_a_sample_does_not_depend_on_its_batch(pipe):
    prompts = [PROMPT, "a handwritten three on a palace", "a handwritten zero on a flower"]
    compiled(pipe)
    together = sample(pipe, [0, 1, 2], prompt=prompts)
    batch_report = afcache.report(pipe)
    for i, prompt in enumerate(prompts):
        alone = sample(pipe, i, prompt=prompt)
        # Rounding differs between batch sizes by about 1e-6, so decisions agree unless one stood on the edge.
        assert decision_margin(pipe) > 1e-4
        pattern = "".join("F" if step.refreshed[i] else "." for step in batch_report.steps)
        assert afcache.report(pipe).pattern() == pattern
        assert largest_difference(alone[0], together[i]) < 1e-4


def test_shared_decisions_compute_less_than_independent_ones(pipe):
    prompts = [PROMPT, "a handwritten three on a palace", "a handwritten zero on a flower", "a handwritten one on a palace"]
    counts = {}
    for mode in ("independent", "shared"):
        compiled(pipe, dataclasses.replace(ADAPTIVE, tolerance=0.01, batch_decisions=mode))
        sample(pipe, [0, 1, 2, 3], prompt=prompts)
        report = afcache.report(pipe)
        counts[mode] = report.block_evaluations
        if mode == "shared":
            assert all(len(set(step.refreshed)) == 1 for step in report.steps)
    assert counts["shared"] < counts["independent"]


def test_the_tenth_image_is_the_first(pipe):
    compiled(pipe)
    first = sample(pipe, 3)
    for seed in range(8):
        sample(pipe, seed, steps=6)
    assert np.array_equal(sample(pipe, 3), first)


def test_an_exception_in_a_callback_leaves_nothing_behind(pipe):
    compiled(pipe)
    expected = sample(pipe)

    def fail(_pipe, step: int, _timestep, arguments: dict):
        if step == 5:
            raise KeyError("stop here")
        return arguments

    with pytest.raises(KeyError, match="stop here"):
        sample(pipe, 1, callback_on_step_end=fail)
    assert np.array_equal(sample(pipe), expected)


def test_an_exception_in_the_second_branch_of_step_zero_leaves_nothing_behind(pipe):
    compiled(pipe)
    expected = sample(pipe, cfg=2.0)
    calls = []

    def fail(_module, _arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("second branch")

    handle = pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="second branch"):
        sample(pipe, 1, cfg=2.0)
    handle.remove()
    assert np.array_equal(sample(pipe, cfg=2.0), expected)


def test_two_pipelines_do_not_disturb_each_other(pipe):
    other = fresh_mini_flux()
    other.set_progress_bar_config(disable=True)
    compiled(pipe)
    expected = sample(pipe)
    compiled(other, CacheConfig(tolerance=0.05, warmup_steps=4))
    images = []

    def interleave(_pipe, step: int, _timestep, arguments: dict):
        if step in (3, 9):
            images.append(sample(other, step, steps=10))
        return arguments

    assert np.array_equal(sample(pipe, callback_on_step_end=interleave), expected)
    assert len(images) == 2
    assert afcache.report(other).config["tolerance"] == 0.05
    assert np.array_equal(sample(other, 3, steps=10), images[0])


def test_the_default_preset_keeps_its_promise(pipe):
    """Balanced, no CFG: at least 3.3 times fewer block evaluations at 38 dB; the 16 seeds are in bench/results."""
    computed, quality = 0, []
    for seed in range(1000, 1004):
        prompt = f"a handwritten {('three', 'five', 'two', 'nine')[seed - 1000]} on a palace"
        expected = sample(pipe, seed, prompt=prompt)
        afcache.compile_pipeline(pipe, compile=False)
        quality.append(afcache.psnr(sample(pipe, seed, prompt=prompt), expected))
        computed += afcache.report(pipe).pattern().count("F")
        afcache.restore_pipeline(pipe)
    assert 4 * 28 / computed >= 3.3
    assert sum(quality) / 4 >= 38


def test_an_image_does_not_depend_on_one_drawn_meanwhile_through_the_same_transformer(pipe):
    other = FluxPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    other.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    compiled(pipe)
    compiled(other)
    expected = sample(pipe)
    pattern = afcache.report(pipe).pattern()

    def interleave(_pipe, step: int, _timestep, arguments: dict):
        if step == 5:
            sample(other, 9, steps=10)
        return arguments

    assert np.array_equal(sample(pipe, callback_on_step_end=interleave), expected)
    assert afcache.report(pipe).pattern() == pattern
    assert len(afcache.report(other).pattern()) == 10


def test_a_bfloat16_pipeline_decides_on_the_float32_schedule(pipe):
    compiled(pipe)
    sample(pipe)
    exact = afcache.report(pipe)
    pipe.to(torch.bfloat16)
    sample(pipe)
    half = afcache.report(pipe)
    assert [step.sigma for step in half.steps] == [step.sigma for step in exact.steps]
    state = pipe.transformer._afcache.last_trajectory(pipe).present[0].states[0]
    # What outputs point at is exact in float32 alone.
    assert state.history.dtype == state.nodes.dtype == torch.float32
    # Errors measured in bfloat16 differ a little; with the float32 schedule few decisions move, and by a step at most.
    refreshes = [[step.step for step in report.steps if step.is_computed] for report in (exact, half)]
    assert abs(len(refreshes[0]) - len(refreshes[1])) <= 1
    assert all(min(abs(i - j) for j in refreshes[1]) <= 1 for i in refreshes[0])


def test_a_bfloat16_pipelines_nodes_are_the_schedulers_sigmas(pipe):
    pipe.to(torch.bfloat16)
    sample(compiled(pipe, CacheConfig(tolerance=0.0)))
    state = pipe.transformer._afcache.last_trajectory(pipe).present[0].states[0]
    assert state.nodes[:, 0].tolist() == pipe.scheduler.sigmas[[27, 26]].tolist()


def test_the_correction_brings_the_image_closer(pipe):
    gains = []
    for seed in range(3):
        expected = sample(pipe, seed)
        quality = {}
        for correction in (True, False):
            image = sample(compiled(pipe, dataclasses.replace(ADAPTIVE, correction=correction)), seed)
            quality[correction] = afcache.psnr(image, expected)
            afcache.restore_pipeline(pipe)
        gains.append(quality[True] - quality[False])
    assert sum(gains) / len(gains) > 1.0


def test_the_measured_error_of_the_latents_grows_with_the_tolerance(pipe):
    exact = [sample(pipe, seed, output_type="latent") for seed in range(3)]
    errors = []
    for tolerance in (0.004, 0.02, 0.1):
        compiled(pipe, dataclasses.replace(ADAPTIVE, tolerance=tolerance))
        latents = [sample(pipe, seed, output_type="latent") for seed in range(3)]
        differences = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(latents, exact, strict=True)]
        errors.append(float(np.mean(differences)))
    assert errors == sorted(errors)
    assert errors[2] > 2 * errors[0]


def test_few_steps_compute_everything_and_say_so(pipe):
    expected = sample(pipe, steps=2)
    image = sample(compiled(pipe), steps=2)
    assert largest_difference(image, expected) < 1e-4
    assert "Nothing was saved" in str(afcache.report(pipe))


def test_a_scheduler_swapped_in_between_is_used(pipe):
    compiled(pipe)
    first = sample(pipe)
    original = pipe.scheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(original.config, use_dynamic_shifting=False, shift=1.0)
    swapped = sample(pipe)
    afcache.restore_pipeline(pipe)
    assert afcache.psnr(swapped, sample(pipe)) > 30
    pipe.scheduler = original
    assert np.array_equal(sample(compiled(pipe)), first)


def test_a_guidance_distilled_model_equals_its_uncached_self(pipe):
    config = {**pipe.transformer.config, "guidance_embeds": True}
    transformer: Any = FluxTransformer2DModel.from_config(config)
    distilled = FluxPipeline(**{**pipe.components, "transformer": transformer})
    distilled.set_progress_bar_config(disable=True)
    expected = [sample(distilled, steps=6, guidance_scale=scale) for scale in (1.0, 3.5)]
    assert not np.array_equal(expected[0], expected[1])
    compiled(distilled, CacheConfig(tolerance=0.0))
    for scale, image in zip((1.0, 3.5), expected, strict=True):
        assert largest_difference(sample(distilled, steps=6, guidance_scale=scale), image) < 1e-4


def test_several_images_per_prompt_decide_one_by_one(pipe):
    compiled(pipe)
    together = sample(pipe, [0, 1], num_images_per_prompt=2)
    report = afcache.report(pipe)
    for seed in (0, 1):
        assert largest_difference(sample(pipe, seed)[0], together[seed]) < 1e-4
        pattern = "".join("F" if step.refreshed[seed] else "." for step in report.steps)
        assert afcache.report(pipe).pattern() == pattern


def test_the_state_has_the_reported_size(pipe):
    for config, channels in ((ADAPTIVE, 32), (RESIDUAL, 96)):
        sample(compiled(pipe, config))
        history, trail = 2 * 64 * channels * 4, 64 * 32 * 4
        assert history + trail < afcache.report(pipe).state_bytes < history + trail + 200
