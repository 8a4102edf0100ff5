"""Named policies against a re-computation by hand, on mini-FLUX."""

import dataclasses
from typing import Any

import pytest
import torch

import afcache
from afcache import POLICIES, CacheConfig, policy
from afcache.functional.state import GroupRecord
from afcache.settings.presets import preset_config, tuned
from bench.mini_flux.sampling import SETTINGS, prepare, prompt_of
from tests.support import by_hand
from tests.support.groups_by_hand import sample_groups_by_hand

pytestmark = pytest.mark.host
STEPS = 28

BY_HAND = {
    "taylorseer": (policy("taylorseer"), by_hand.every(3, 6), by_hand.taylor, {}),
    "fbcache": (policy("fbcache"), by_hand.first_blocks(1, 0.08, 1), by_hand.reuse, {"first": 1}),
    "dbcache": (
        policy("dbcache", first_blocks=5, last_blocks=2, threshold=0.3),
        by_hand.first_blocks(5, 0.3, 8),
        by_hand.reuse,
        {"first": 5, "last": 2},
    ),
    "dbcache with TaylorSeer": (
        policy("dbcache", first_blocks=2, threshold=0.2, warmup_steps=4, order=1, forecast="taylorseer"),
        by_hand.first_blocks(2, 0.2, 4),
        by_hand.taylor,
        {"first": 2},
    ),
    "teacache": (policy("teacache"), by_hand.teacache(0.6, STEPS - 1), by_hand.reuse, {}),
    "magcache": (policy("magcache"), by_hand.listed("FFF..F...F.F.....F.....F..F."), by_hand.reuse, {}),
    "spectrum": (policy("spectrum"), by_hand.listed("FFFFF.F.F..F...F....F....F.."), by_hand.chebyshev, {}),
    "fixed": (policy("fixed"), by_hand.every(3, 4), by_hand.linear_in_sigma, {}),
    "none": (policy("none"), by_hand.every(1, 1), by_hand.reuse, {}),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_policy_is_what_its_rule_says(pipe, name: str):
    config, rule, forecast, sections = BY_HAND[name]
    problem = prepare(pipe, [3], steps=STEPS)
    (inputs,) = problem.branches
    if forecast is by_hand.linear_in_sigma:
        forecast = forecast(problem.sigmas)
    pattern, latents = by_hand.sample_by_hand(pipe.transformer, inputs, problem.sigmas, rule, forecast, **sections)
    result = afcache.denoise(pipe.transformer, inputs, problem.sigmas, config=config)
    assert result.pattern() == pattern
    assert ("." in pattern) == (name != "none")
    # Forecasts add up float32 rounding in another order.
    torch.testing.assert_close(result.latents, latents, rtol=0, atol=5e-4)


@pytest.mark.parametrize(("name", "threshold"), [("similarity", 0.01), ("attention", 0.02), ("difference", 0.2)])
@pytest.mark.parametrize("edges", [[0, 12], [0, 4, 8, 12]])
def test_groups_that_gate_themselves_do_what_their_statistic_says(pipe, name: str, threshold: float, edges: list[int]):
    problem = prepare(pipe, [3], steps=STEPS)
    (inputs,) = problem.branches
    config = policy(name, groups=len(edges) - 1, **{f"{name}_threshold": threshold})
    by_hand = sample_groups_by_hand(
        pipe.transformer, inputs, problem.sigmas, name, edges=edges, threshold=threshold, warmup=config.warmup_steps
    )
    result = afcache.denoise(pipe.transformer, inputs, problem.sigmas, config=config)
    records = [record.groups for (record,) in result.records if isinstance(record.groups, GroupRecord)]
    assert len(records) == STEPS
    choices = torch.stack([record.choice[:, 0] for record in records], dim=1)
    assert ["".join("F" if choice == 0 else "." for choice in group) for group in choices.tolist()] == by_hand.patterns
    # The first step has nothing to compare with.
    distances = torch.stack([record.distance[:, 0] for record in records], dim=1)[:, 1:]
    torch.testing.assert_close(distances, torch.tensor(by_hand.distances)[:, 1:], rtol=1e-3, atol=2e-6)
    torch.testing.assert_close(result.latents, by_hand.latents, rtol=0, atol=5e-4)
    assert any("." in pattern and "F" in pattern[config.warmup_steps :] for pattern in by_hand.patterns)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"none"}))
def test_every_policy_runs_in_the_pipeline_and_takes_our_correction(pipe, name: str):
    config = policy(name, first_blocks=4) if name == "dbcache" else policy(name)
    problem = prepare(pipe, [3], steps=STEPS)
    latents = []
    for correction in (False, True):
        afcache.compile_pipeline(pipe, dataclasses.replace(config, correction=correction), compile=False)
        options = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(3), "output_type": "latent"}
        latents.append(pipe(prompt_of(3), **SETTINGS, **options).images)
        report = afcache.report(pipe)
        assert set(report.pattern()) > {"F"}
        assert report.block_evaluations + report.mlp_evaluations <= report.block_evaluations_uncached
    errors = [float((x - problem.latents).norm()) for x in latents]
    # Closer to the uncached image; "attention" seldom refreshes, so there is little to correct.
    assert errors[1] < errors[0] or name == "attention"


def test_thresholds_of_zero_compute_every_step(pipe):
    problem = prepare(pipe, [3], steps=12)
    zero = [
        policy("fbcache", threshold=0.0),
        policy("teacache", threshold=0.0),
        policy("magcache", threshold=0.0),
        policy("similarity", similarity_threshold=0.0),
        policy("attention", attention_threshold=0.0),
        policy("difference", difference_threshold=0.0, groups=3),
        policy("layerwise", tolerance=0.0),
    ]
    for config in zero:
        result = afcache.denoise(pipe.transformer, problem.branches[0], problem.sigmas, config=config)
        assert result.pattern() == "F" * 12
        torch.testing.assert_close(result.latents, problem.latents, rtol=0, atol=1e-4)


def test_policy_sets_fields_of_the_config_and_of_its_groups():
    config = policy("difference", difference_threshold=0.3, groups=2, correction=True)
    assert config.correction
    assert config.layerwise == afcache.Layerwise(
        groups=2, strategy="difference", difference_threshold=0.3, adapt_thresholds=False
    )
    assert policy("adaptive") == afcache.PRESETS["balanced"]
    assert policy("adaptive", tolerance=afcache.PRESETS["fast"].tolerance) == afcache.PRESETS["fast"]
    assert policy("layerwise", tolerance=0.032).max_growth == policy("residual", tolerance=0.032).max_growth == 2.0
    assert policy("layerwise").target == "residual"
    assert policy("noise", tolerance=0.032).max_growth == 2.5
    assert policy("velocity", tolerance=0.256).max_growth == 5.5


@pytest.mark.parametrize("target", ["residual", "velocity", "noise"])
def test_every_target_is_a_policy_that_depends_on_no_default(target: Any):
    assert policy(target) == preset_config("balanced", target=target)
    assert policy(target, tolerance=0.1) == tuned(0.1, target=target)
    assert policy(target).target == target


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: policy("teacash"), ValueError, r"name must be one of 'adaptive', .*, got 'teacash'"),
        (lambda: policy("teacache", thresold=1), TypeError, r"unknown settings \['thresold'\]; CacheConfig has"),
        (lambda: policy("teacache", groups=2), ValueError, r"'teacache' has no groups, so \['groups'\] cannot be set"),
    ],
)
def test_bad_policies_name_the_way_out(call, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()


def test_calibration_measures_the_residuals_norms_and_leaves_the_pipeline_as_it_was(pipe):
    forward = pipe.transformer.forward
    options = {"num_inference_steps": 5, **SETTINGS}
    ratios = afcache.calibrate_magnitudes(pipe, [prompt_of(3)], generator=torch.Generator().manual_seed(3), **options)
    assert pipe.transformer.forward == forward
    problem = prepare(pipe, [3], steps=5)
    inputs, norms, latents = problem.branches[0], [], problem.branches[0].hidden_states
    with torch.no_grad():
        for sigma, sigma_next in zip(problem.sigmas[:-1], problem.sigmas[1:], strict=True):
            host = by_hand.Host(pipe.transformer, inputs, latents, float(sigma))
            image, _ = host.run((host.image, host.text), 0, 12)
            norms.append((image - host.image).norm(dim=-1))
            latents = latents + (sigma_next - sigma) * host.head(image)
    expected = [1.0] + [float((norms[i] / norms[i - 1]).mean()) for i in range(1, 5)]
    assert ratios == pytest.approx(expected, abs=1e-4)


def test_calibration_refuses_what_it_cannot_measure(pipe):
    with pytest.raises(ValueError, match="prompts must be a list of at least one prompt, got 'a cat'"):
        afcache.calibrate_magnitudes(pipe, "a cat")
    afcache.compile_pipeline(pipe, CacheConfig(), compile=False)
    with pytest.raises(ValueError, match=r"cached already\. Call afcache\.restore_pipeline"):
        afcache.calibrate_magnitudes(pipe, ["a cat"])
