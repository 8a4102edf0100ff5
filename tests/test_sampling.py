"""The functional step without a pipeline: the pipeline's own result, and one graph for everything."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import afcache
from afcache import CacheConfig
from bench.mini_sampling import Prepared, prepare
from tests.sampling import largest_difference

pytestmark = pytest.mark.host
ADAPTIVE = CacheConfig(tolerance=0.02, warmup_steps=2)


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
    before = [tensor.clone() for tensor in problem.branches[0] if tensor is not None]
    first = denoise(pipe, problem)
    assert torch.equal(denoise(pipe, problem).latents, first.latents)
    after = [tensor for tensor in problem.branches[0] if tensor is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(
    ("backend", "tolerance"), [("aot_eager", 1e-4), pytest.param("inductor", 2e-3, marks=pytest.mark.compile)]
)
def test_a_compiled_step_is_one_graph_for_each_number_of_branches(pipe, backend: str, tolerance: float):
    """Eager's decisions and latents, whatever changes between images."""
    step = torch.compile(afcache.denoising_step, fullgraph=True, backend=backend)
    problems = [
        (prepare(pipe, [0]), ADAPTIVE),
        (prepare(pipe, [3], cfg=2.0), ADAPTIVE),
        (prepare(pipe, [17], steps=20), ADAPTIVE),
        (prepare(pipe, [5], steps=20, cfg=4.0), ADAPTIVE),
    ]
    for problem, config in problems:
        eager, compiled = denoise(pipe, problem, config), denoise(pipe, problem, config, step=step)
        assert compiled.pattern() == eager.pattern()
        assert set(compiled.pattern()) == {"F", "."}
        assert largest_difference(compiled.latents.numpy(), eager.latents.numpy()) < tolerance
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmas": torch.tensor([0.0, 1.0])}, r"sigmas must be a falling sequence of at least two noise levels"),
        ({"sigmas": torch.tensor([1.0])}, r"sigmas must be a falling .* got shape \(1,\)"),
        ({"config": CacheConfig(policy="none")}, r"config.policy must be .* CacheConfig\(tolerance=0.0\)"),
        ({"guidance_scale": 2.0}, r"guidance_scale must be 1 without negative inputs, got 2.0"),
    ],
    ids=["rising", "too few", "policy none", "guidance alone"],
)
def test_bad_arguments_name_the_rule(pipe, options: dict[str, Any], message: str):
    problem = prepare(pipe, [0], steps=2)
    arguments = {"sigmas": problem.sigmas, **options}
    with pytest.raises(ValueError, match=message):
        afcache.denoise(pipe.transformer, problem.branches[0], **arguments)


def test_negative_inputs_of_another_shape_are_refused(pipe):
    problem, other = prepare(pipe, [0], steps=2), prepare(pipe, [0, 1], steps=2)
    with pytest.raises(ValueError, match=r"negative.hidden_states must have the shape .* \(1, 64, 32\), got \(2, 64, 32\)"):
        afcache.denoise(pipe.transformer, problem.branches[0], problem.sigmas, negative=other.branches[0])


def test_the_readmes_example_runs(capsys: pytest.CaptureFixture[str]):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "afcache.denoise(" in block)
    assert "torch.compile(afcache.denoising_step, fullgraph=True)" in example
    exec(example.replace("fullgraph=True", 'fullgraph=True, backend="aot_eager"'), {})
    pattern = capsys.readouterr().out.strip()
    assert len(pattern) == 28
    assert set(pattern) == {"F", "."}
    assert counters["stats"]["unique_graphs"] == 1
