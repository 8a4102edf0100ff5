"""A state is a value: it can be kept, read again and gone on with, as often as one likes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

import afcache
from afcache import CacheConfig, Denoised, Layerwise
from bench.mini_flux.sampling import Prepared, prepare
from tests.support.sampling import RESIDUAL, page_example
from tests.support.toy import tensors_of

pytestmark = pytest.mark.host
STEPS = 10
CONFIGS = {
    "residual": RESIDUAL,
    "noise": afcache.policy("noise"),
    "groups": CacheConfig(tolerance=0.02, warmup_steps=2, layerwise=Layerwise(groups=2)),
    "gate": CacheConfig(policy="teacache", threshold=0.3, warmup_steps=1),
    "chebyshev": CacheConfig(policy="growing", forecast="chebyshev", order=2, warmup_steps=3, interval=2),
}


def denoise(pipe: Any, problem: Prepared, config: CacheConfig = RESIDUAL, **options: Any) -> Denoised:
    inputs, *others = problem.branches
    guidance = {"negative": others[0], "guidance_scale": problem.cfg} if others else {}
    return afcache.denoise(pipe.transformer, inputs, problem.sigmas, config=config, **guidance, **options)


def assert_equal(first: Denoised, second: Denoised) -> None:
    """Bit for bit, NaN included, and of the same types."""
    pairs = zip(tensors_of(tuple(first)), tensors_of(tuple(second)), strict=True)
    assert all(x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)
    assert pytree.tree_structure(first) == pytree.tree_structure(second)


@pytest.mark.parametrize(("config", "cfg"), [*((name, 1.0) for name in CONFIGS), ("residual", 2.0), ("noise", 2.0)])
def test_a_trajectory_goes_on_from_a_file_as_if_it_had_never_stopped(pipe, tmp_path: Path, config: str, cfg: float):
    problem, settings = prepare(pipe, [0, 1], steps=STEPS, cfg=cfg), CONFIGS[config]
    whole = denoise(pipe, problem, settings)
    assert set(whole.pattern()) == {"F", "."}
    half = denoise(pipe, problem, settings, stop=5)
    assert len(half.records) == 5
    afcache.save_checkpoint(half, tmp_path / "half.safetensors")
    read = afcache.load_checkpoint(tmp_path / "half.safetensors")
    assert_equal(read, half)
    assert_equal(denoise(pipe, problem, settings, start=read), whole)


def test_one_state_has_several_futures(pipe):
    problem = prepare(pipe, [0], steps=STEPS)
    half = denoise(pipe, problem, stop=4)
    before = pytree.tree_map_only(torch.Tensor, torch.clone, tuple(half))
    same, other = (denoise(pipe, problem, CacheConfig(tolerance=t, warmup_steps=2), start=half) for t in (0.02, 10.0))
    assert_equal(half, Denoised(*before))
    assert half.origin is not None
    assert_equal(same, denoise(pipe, problem))
    assert same.pattern()[:4] == other.pattern()[:4]
    assert same.pattern() != other.pattern()


def test_a_compiled_step_goes_on_in_the_same_graph(short, tmp_path: Path):
    problem = prepare(short, [0], steps=STEPS)
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(afcache.denoising_step, fullgraph=True, backend="aot_eager")
    whole = denoise(short, problem, step=step)
    afcache.save_checkpoint(denoise(short, problem, step=step, stop=5), tmp_path / "half.safetensors")
    assert_equal(denoise(short, problem, step=step, start=afcache.load_checkpoint(tmp_path / "half.safetensors")), whole)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"stop": 2}, ValueError, "stop must be a step after the 2 done and at most 4, got 2"),
        ({"stop": 5}, ValueError, "stop must be a step after the 2 done and at most 4, got 5"),
        ({"stop": True}, ValueError, "stop must be a step after .* got True"),
        ({"start": 3}, TypeError, "start must be what denoise or load_checkpoint returned, got int"),
        ({"negative": True}, ValueError, "start must have a state for each guidance branch, 2, got 1"),
        ({"config": CONFIGS["noise"]}, ValueError, "start must have the target of the config, 'noise', got 'residual'"),
        ({"config": CONFIGS["groups"]}, ValueError, "CacheState.history has shape"),
        ({"config": CONFIGS["gate"]}, TypeError, "CacheState.gate must be GateState under these settings, got None"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(pipe, change: dict[str, Any], kind: type[Exception], said: str):
    inputs, *_ = prepare(pipe, [0], steps=4).branches
    sigmas = torch.linspace(1, 0, 5)
    half = afcache.denoise(pipe.transformer, inputs, sigmas, config=RESIDUAL, stop=2)._replace(origin=None)
    change = {**change, **({"negative": inputs} if "negative" in change else {})}
    with pytest.raises(kind, match=said):
        afcache.denoise(pipe.transformer, inputs, sigmas, **{"start": half, "config": RESIDUAL, **change})
    other = half._replace(latents=half.latents[:, :8])
    with pytest.raises(ValueError, match=r"start\.latents must have shape \(1, 64, 32\) on cpu"):
        afcache.denoise(pipe.transformer, inputs, sigmas, config=RESIDUAL, start=other)


@pytest.mark.parametrize(
    ("sigmas", "said"),
    [
        (torch.linspace(1, 0, 6), r"at other noise levels than sigmas: \[0\.75, 1\.0\] at steps \[1, 0\], which are \[0\.8"),
        (torch.linspace(0.9, 0, 5), "at other noise levels"),
        (torch.tensor([1.0, 0.0]), "at other noise levels"),
    ],
)
def test_a_start_over_other_sigmas_is_refused(pipe, sigmas: torch.Tensor, said: str):
    inputs, *_ = prepare(pipe, [0], steps=4).branches
    half = afcache.denoise(pipe.transformer, inputs, torch.linspace(1, 0, 5), config=RESIDUAL, stop=2)
    with pytest.raises(ValueError, match=said):
        afcache.denoise(pipe.transformer, inputs, sigmas, config=RESIDUAL, start=half._replace(origin=None))


def test_a_start_that_cannot_be_gone_on_with_is_refused(pipe):
    inputs, *_ = prepare(pipe, [0], steps=4).branches
    sigmas = torch.linspace(1, 0, 5)
    half = afcache.denoise(pipe.transformer, inputs, sigmas, config=RESIDUAL, stop=2)
    (state,) = half.states
    others = {
        "start knows step 1, but has 0 records": half._replace(records=[]),
        "start's latents must be torch.float32 on cpu": half._replace(latents=half.latents.double()),
        "start's states' history must be torch.float32": half._replace(states=(state._replace(history=state.history.half()),)),
        "CacheState.error_rate must be >= 0": half._replace(states=(state._replace(error_rate=state.error_rate.neg()),)),
    }
    for said, start in others.items():
        with pytest.raises(ValueError, match=said):
            afcache.denoise(pipe.transformer, inputs, sigmas, config=RESIDUAL, start=start)


def test_the_pages_continuation_runs(pipe, tmp_path: Path, monkeypatch):
    """The lines on states as values, after those that make the inputs."""
    example = page_example("save_checkpoint")
    monkeypatch.chdir(tmp_path)
    problem = prepare(pipe, [0], steps=STEPS)
    scope: dict[str, Any] = {"afcache": afcache, "transformer": pipe.transformer, "inputs": problem.branches[0]}
    exec(example, {**scope, "sigmas": torch.linspace(1, 0, 29)}, scope)
    assert torch.equal(
        scope["result"].latents, afcache.denoise(pipe.transformer, problem.branches[0], torch.linspace(1, 0, 29)).latents
    )
    assert scope["bolder"].pattern()[:14] == scope["result"].pattern()[:14]
