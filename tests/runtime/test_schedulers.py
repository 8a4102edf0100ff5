"""Schedulers as FluxPipeline drives them: with each, nothing changes at tolerance 0, and mixed decisions stay close."""

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

import afcache
from afcache import CacheConfig
from tests.support.sampling import ADAPTIVE, compiled, largest_difference, sample

pytestmark = pytest.mark.host
MULTISTEP = {"use_flow_sigmas": True, "use_dynamic_shifting": True, "prediction_type": "flow_prediction"}
# kind, settings over those of mini-FLUX's scheduler
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dynamic shift": (FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True}),
    "linear shift": (FlowMatchEulerDiscreteScheduler, {"time_shift_type": "linear"}),
    "static shift": (FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": False, "shift": 3.0}),
    "shift_terminal": (FlowMatchEulerDiscreteScheduler, {"shift_terminal": 0.1}),
    "karras": (FlowMatchEulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "exponential": (FlowMatchEulerDiscreteScheduler, {"use_exponential_sigmas": True}),
    "beta": (FlowMatchEulerDiscreteScheduler, {"use_beta_sigmas": True}),
    "dpm": (DPMSolverMultistepScheduler, MULTISTEP),
    "dpm order 3": (DPMSolverMultistepScheduler, {**MULTISTEP, "solver_order": 3}),
    "unipc": (UniPCMultistepScheduler, MULTISTEP),
    "unipc karras": (UniPCMultistepScheduler, {**MULTISTEP, "use_karras_sigmas": True}),
}
NOISY: dict[str, tuple[Any, dict[str, Any]]] = {
    "stochastic": (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
    "lcm": (FlowMatchLCMScheduler, {}),
    "sde": (DPMSolverMultistepScheduler, {**MULTISTEP, "algorithm_type": "sde-dpmsolver++"}),
}


def schedule(pipe: Any, name: str) -> Any:
    kind, settings = (SCHEDULERS | NOISY)[name]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)
    return pipe


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(pipe, name: str):
    """Tolerance 0 is the uncached image; mixed decisions stay near it, and what they leave out is returned."""
    expected = sample(schedule(pipe, name))
    assert largest_difference(sample(compiled(pipe, CacheConfig(tolerance=0.0))), expected) < 1e-4
    image = sample(compiled(pipe, dataclasses.replace(ADAPTIVE, tolerance=0.01, error_exponent=1.0)))
    report = afcache.report(pipe)
    assert set(report.pattern()) == {"F", "."}
    assert report.block_speedup > 1.5
    is_euler = SCHEDULERS[name][0] is FlowMatchEulerDiscreteScheduler
    assert report.correction == ("step" if is_euler else "solver")
    assert afcache.psnr(image, expected) > 40


def test_all_schedulers_share_two_graphs(short):
    """One graph where nothing is remembered of earlier outputs, one for solvers; mixed decisions under all, no break."""
    afcache.compile_pipeline(short, ADAPTIVE, backend="eager")
    original = short.scheduler
    for name, (kind, _) in SCHEDULERS.items():
        short.scheduler = original
        sample(schedule(short, name), steps=14)
        assert set(afcache.report(short).pattern()) == {"F", "."}, name
        graphs = 1 if kind is FlowMatchEulerDiscreteScheduler else 2
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, name
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("name", NOISY)
def test_scheduler_that_draws_noise_is_refused_or_computes_every_step(pipe, name: str):
    torch.manual_seed(3)
    expected = sample(schedule(pipe, name), steps=8)
    with pytest.raises(NotImplementedError, match="draws new noise at every step"):
        compiled(pipe)
    compiled(pipe, CacheConfig(policy="none"))
    torch.manual_seed(3)
    assert largest_difference(sample(pipe, steps=8), expected) < 1e-4


def test_flow_sigmas_that_diffusers_ignores_are_refused(pipe):
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **MULTISTEP, use_karras_sigmas=True)
    compiled(pipe)
    with pytest.raises(ValueError, match=r"scheduler\.sigmas must lie in \[0, 1\]"):
        sample(pipe, steps=6)


def test_a_last_noise_level_that_repeats_is_refused(pipe):
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, **MULTISTEP, final_sigmas_type="sigma_min")
    compiled(pipe)
    with pytest.raises(ValueError, match=r"scheduler\.sigmas repeats .* at steps 5 and 6"):
        sample(pipe, steps=6)
