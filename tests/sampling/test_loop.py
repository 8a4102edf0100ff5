"""The functional step without a pipeline: the pipeline's own result, and one graph for everything."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import afcache
from afcache import CacheConfig
from afcache.functional.model import scaled_dot_product_attention
from afcache.functional.plans import schedule_steps
from afcache.models.flux1.architecture import FLUX
from afcache.sampling.primitives import init_state
from bench.mini_flux.sampling import Prepared, prepare
from tests.support.sampling import ADAPTIVE, largest_difference, page_example

pytestmark = pytest.mark.host


def denoise(pipe: Any, problem: Prepared, config: CacheConfig = ADAPTIVE, **options: Any) -> afcache.Denoised:
    inputs, *others = problem.branches
    negative = others[0] if others else None
    return afcache.denoise(
        pipe.transformer,
        inputs,
        problem.sigmas,
        negative=negative,
        guidance_scale=problem.cfg,
        config=config,
        **options,
    )


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_tolerance_zero_equals_the_uncached_pipeline(pipe, cfg: float):
    problem = prepare(pipe, [0], steps=12, cfg=cfg)
    result = denoise(pipe, problem, CacheConfig(tolerance=0.0))
    assert result.pattern() == "F" * 12
    assert largest_difference(result.latents.numpy(), problem.latents.numpy()) < 1e-4


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_the_trajectory_is_the_cached_pipelines(pipe, cfg: float):
    """Two implementations of the same loop: diffusers' with one call per branch, ours with one decision per step."""
    problem = prepare(pipe, [4], cfg=cfg)
    result = denoise(pipe, problem)
    afcache.compile_pipeline(pipe, ADAPTIVE, compile=False)
    cached = prepare(pipe, [4], cfg=cfg).latents
    assert afcache.report(pipe).pattern() == result.pattern()
    assert set(result.pattern()) == {"F", "."}
    assert largest_difference(result.latents.numpy(), cached.numpy()) < 1e-4
    assert largest_difference(result.latents.numpy(), problem.latents.numpy()) > 1e-3


def test_a_trajectory_changes_nothing_that_went_in(pipe):
    problem = prepare(pipe, [0], steps=8)
    before = [x.clone() for x in problem.branches[0] if isinstance(x, torch.Tensor)]
    first = denoise(pipe, problem)
    assert torch.equal(denoise(pipe, problem).latents, first.latents)
    after = [x for x in problem.branches[0] if isinstance(x, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(
    ("backend", "tolerance"),
    # Within pipelines inductor is asked every time.
    [("aot_eager", 1e-4), pytest.param("inductor", 2e-3, marks=[pytest.mark.compile, pytest.mark.contract])],
)
def test_a_compiled_step_is_one_graph_for_each_number_of_branches(short, backend: str, tolerance: float):
    """Eager's decisions and latents, whatever changes between images. Of one branch, inductor's are the pipeline's."""
    step = torch.compile(afcache.denoising_step, fullgraph=True, backend=backend)
    problems = [
        (prepare(short, [0]), ADAPTIVE),
        (prepare(short, [3], cfg=2.0), ADAPTIVE),
        (prepare(short, [17], steps=20), ADAPTIVE),
        (prepare(short, [5], steps=20, cfg=4.0), ADAPTIVE),
    ]
    if backend == "inductor":
        problems = [(problem, config) for problem, config in problems if problem.cfg > 1]
    for problem, config in problems:
        eager, compiled = denoise(short, problem, config), denoise(short, problem, config, step=step)
        assert compiled.pattern() == eager.pattern()
        assert set(compiled.pattern()) == {"F", "."}
        assert largest_difference(compiled.latents.numpy(), eager.latents.numpy()) < tolerance
    assert counters["stats"]["unique_graphs"] == len({len(problem.branches) for problem, _ in problems})
    assert not counters["graph_break"]


def test_policy_none_computes_every_step(pipe):
    problem = prepare(pipe, [0], steps=8)
    result = denoise(pipe, problem, CacheConfig(policy="none"))
    assert result.pattern() == "F" * 8
    assert largest_difference(result.latents.numpy(), problem.latents.numpy()) < 1e-4


def test_one_step_serves_every_tolerance_and_few_graphs_every_shape(short):
    """A new tolerance, growth limit or damping adds no graph; another text length adds one, the third none."""
    step = torch.compile(afcache.denoising_step, fullgraph=True, backend="aot_eager")
    problem = prepare(short, [0], steps=6)
    for tolerance in (0.0, 0.01, 0.1):
        denoise(short, problem, dataclasses.replace(ADAPTIVE, tolerance=tolerance), step=step)
        denoise(short, problem, dataclasses.replace(ADAPTIVE, max_growth=1 + tolerance, damping=tolerance), step=step)
    denoise(short, problem, dataclasses.replace(ADAPTIVE, max_growth=math.inf), step=step)
    assert counters["stats"]["unique_graphs"] == 1
    for length in (12, 10, 8):
        (inputs,) = problem.branches
        text = inputs.encoder_hidden_states[:, :length].clone()
        shorter = inputs._replace(encoder_hidden_states=text, txt_ids=inputs.txt_ids[:length].clone())
        denoise(short, problem._replace(branches=(shorter,)), step=step)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_guidance_switched_on_late_computes(pipe):
    """The second branch has no history to forecast from, whatever the policy thinks is due."""
    problem = prepare(pipe, [0], steps=12, cfg=2.0)
    config = CacheConfig(policy="fixed", interval=5, warmup_steps=2)
    fixed = {"architecture": FLUX, "kernel": scaled_dot_product_attention, "config": config}
    prompt, _ = problem.branches
    latents, scale = prompt.hidden_states, torch.full((1,), 2.0)
    states = (init_state(1, 64, 96, config=config),)
    decisions = ""
    with torch.no_grad():
        for index, schedule in enumerate(schedule_steps(problem.sigmas, config)):
            if index == 4:
                states = (*states, init_state(1, 64, 96, config=config))
            branches = problem.branches[: len(states)]
            arguments = (pipe.transformer, branches, latents, states, schedule, scale)
            latents, states, records = afcache.denoising_step(*arguments, **fixed)
            decisions += "F" if records[0].is_computed else "."
    assert decisions == "FF..F.F....F"
    assert bool(torch.isfinite(latents).all())


def test_prompts_that_were_encoded_in_one_batch_compile(short):
    """Views of one tensor, which torch.cond would not take."""
    problem = prepare(short, [0], steps=6, cfg=2.0)
    prompt, negative = problem.branches
    text = torch.cat([prompt.encoder_hidden_states, negative.encoder_hidden_states])
    ids = torch.cat([prompt.txt_ids, prompt.img_ids])
    shared = {"txt_ids": ids[:16], "img_ids": ids[16:]}
    views = (
        prompt._replace(encoder_hidden_states=text[:1], **shared),
        negative._replace(encoder_hidden_states=text[1:], **shared),
    )
    step = torch.compile(afcache.denoising_step, fullgraph=True, backend="aot_eager")
    compiled = denoise(short, problem._replace(branches=views), step=step)
    torch.testing.assert_close(compiled.latents, denoise(short, problem).latents, rtol=0, atol=1e-4)


def test_noise_levels_that_float32_cannot_tell_apart_are_refused(pipe):
    problem = prepare(pipe, [0], steps=2)
    sigmas = torch.tensor([1.0, 1.0 - 1e-9, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="distinct in float32"):
        denoise(pipe, problem._replace(sigmas=sigmas))


def test_what_compile_pipeline_refuses_is_refused_here(pipe):
    problem = prepare(pipe, [0], steps=2)
    block = pipe.transformer.single_transformer_blocks[0]
    hook = block.register_forward_hook(lambda *_: None)
    try:
        with pytest.raises(NotImplementedError, match="forward hooks"):
            denoise(pipe, problem)
    finally:
        hook.remove()


def test_a_third_branch_is_refused(pipe):
    problem = prepare(pipe, [0], steps=2)
    state = init_state(1, 64, 96, config=ADAPTIVE)
    schedule = schedule_steps(problem.sigmas, ADAPTIVE)[0]
    with pytest.raises(ValueError, match="one or two, got 3"):
        afcache.denoising_step(
            pipe.transformer,
            problem.branches * 3,
            problem.branches[0].hidden_states,
            (state,) * 3,
            schedule,
            torch.ones(1),
            architecture=FLUX,
            kernel=scaled_dot_product_attention,
            config=ADAPTIVE,
        )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sigmas": torch.tensor([0.0, 1.0])}, ValueError, "sigmas must be a falling sequence of at least two noise levels"),
        ({"sigmas": torch.tensor([1.0])}, ValueError, r"sigmas must be a falling .* got shape \(1,\)"),
        ({"sigmas": torch.linspace(1000, 0, 9)}, ValueError, r"sigmas must lie in \[0, 1\], got 1000 to 0: timesteps"),
        ({"sigmas": [1.0, 0.0]}, TypeError, "sigmas must be a tensor of noise levels, got list"),
        ({"sigmas": torch.linspace(1, 0, 5) + 0j}, TypeError, r"sigmas must be real numbers, got torch\.complex64\. Take"),
        ({"sigmas": torch.tensor([True, False])}, TypeError, r"sigmas must be real numbers, got torch\.bool"),
        ({"guidance_scale": None}, TypeError, "guidance_scale must be one number for all samples, got None; 1 means no"),
        ({"guidance_scale": torch.ones(2)}, TypeError, r"guidance_scale must be one number .* tensor\(.*value\.item\(\) is"),
        ({"guidance_scale": 2.0}, ValueError, "guidance_scale must be 1 without negative inputs, got 2.0"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale must be finite, got nan"),
        ({"negative": {}}, TypeError, "negative must be afcache.FluxInputs, got dict"),
    ],
)
def test_bad_arguments_name_the_rule(pipe, options: dict[str, Any], error: type[Exception], message: str):
    problem = prepare(pipe, [0], steps=2)
    arguments = {"sigmas": problem.sigmas, **options}
    with pytest.raises(error, match=message):
        afcache.denoise(pipe.transformer, problem.branches[0], **arguments)


@pytest.mark.parametrize("seeds", [[1], [0, 1]], ids=["other values", "another shape"])
def test_negative_inputs_with_other_latents_are_refused(pipe, seeds: list[int]):
    problem, other = prepare(pipe, [0], steps=2), prepare(pipe, seeds, steps=2)
    with pytest.raises(ValueError, match="both branches share the latents"):
        afcache.denoise(pipe.transformer, problem.branches[0], problem.sigmas, negative=other.branches[0])


def test_the_pages_example_runs(capsys: pytest.CaptureFixture[str]):
    example = page_example("torch.compile(afcache.denoising_step")
    assert "torch.compile(afcache.denoising_step, fullgraph=True)" in example
    assert "pipe" not in example
    exec(example.replace("fullgraph=True", 'fullgraph=True, backend="aot_eager"'), {})
    pattern = capsys.readouterr().out.strip()
    assert len(pattern) == 28
    assert set(pattern) == {"F", "."}
    assert counters["stats"]["unique_graphs"] == 1
