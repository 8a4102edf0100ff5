"""What holds for a small FLUX under every policy, gates and groups included, and for a pipeline in any order of use."""

import dataclasses
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import afcache
from afcache import CacheConfig, FluxInputs, Layerwise
from afcache.functional.initial import state_bytes
from afcache.functional.model import model_of, scaled_dot_product_attention
from afcache.functional.outputs import full_forward
from afcache.models.flux1 import architecture as flux1
from afcache.models.flux1 import inputs as flux1_inputs
from afcache.sampling.primitives import denoising_step
from tests.support import cases
from tests.support.cases import numbers, property_test
from tests.support.mini_flux import fresh_mini_flux
from tests.support.sampling import sample
from tests.support.tiny import tiny_flux

TRANSFORMER: Any = None


@pytest.fixture(scope="module", autouse=True)
def transformer():
    """Two kinds of blocks, random weights; the head is not the zeros that it starts as."""
    global TRANSFORMER
    torch.manual_seed(0)
    TRANSFORMER = tiny_flux(in_channels=8, num_single_layers=2, joint_attention_dim=6, pooled_projection_dim=5)
    TRANSFORMER.requires_grad_(False)
    return TRANSFORMER


@st.composite
def flux_inputs(draw: st.DrawFn) -> FluxInputs:
    batch, text = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    height, width = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return FluxInputs(
        torch.randn(batch, height * width, 8, generator=source),
        torch.randn(batch, text, 6, generator=source),
        torch.randn(batch, 5, generator=source),
        torch.ones(batch),
        torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width))),
        torch.zeros(text, 3),
        guidance=None,
    )


@st.composite
def any_config(draw: st.DrawFn, careful: bool = False, **fixed: Any) -> CacheConfig:
    """Settings of any policy; careful ones may cache nothing."""
    threshold = 0.0 if careful else draw(st.sampled_from([0.05, 0.2, 1.0, 4.0]))
    tolerance = 0.0 if careful else draw(st.sampled_from([0.005, 0.05, 0.5]))
    kind = draw(st.sampled_from(["plain", "gate", "ends", "groups"]))
    common: dict[str, Any] = {"tolerance": tolerance, "threshold": threshold, **fixed}
    if kind == "gate":
        policy = draw(st.sampled_from(["teacache", "dbcache"]))
        return draw(cases.configs(**common, policy=policy, first_blocks=1 if policy == "dbcache" else 0))
    if careful:
        common["policy"] = draw(st.sampled_from(["adaptive", "none"]))
    if kind == "ends":
        return draw(cases.configs(**common, first_blocks=draw(st.integers(0, 1)), last_blocks=draw(st.integers(0, 1))))
    if kind == "plain":
        target, weight = draw(st.sampled_from(["residual", "velocity", "noise"])), draw(st.sampled_from([0.0, 0.5, 2.0]))
        return draw(cases.configs(**common, target=target, error_weight=weight, early_weight=weight / 2))
    strategy: Any = draw(st.sampled_from(["by_stability", "taylor", "similarity", "attention", "difference"]))
    thresholds: dict[str, Any] = {f"{name}_threshold": threshold for name in ("similarity", "attention", "difference")}
    layerwise = Layerwise(
        groups=draw(st.integers(1, 3)),
        strategy=strategy,
        stability_decay=draw(st.sampled_from([0, 0.5])),
        stability_margin=draw(st.sampled_from([0, 0.01])),
        adapt_thresholds=draw(st.booleans()),
        **thresholds,
    )
    if careful:
        common["policy"] = "adaptive"
    elif "policy" not in common:
        common["policy"] = draw(st.sampled_from(["adaptive", "fixed", "planned"]))
    return draw(cases.configs(**{**common, "forecast": "polynomial"}, layerwise=layerwise))


def denoise(inputs: FluxInputs, sigmas: Tensor, config: CacheConfig, scale: float = 1.0, **options: Any) -> afcache.Denoised:
    if scale != 1:
        options["negative"] = inputs._replace(encoder_hidden_states=-inputs.encoder_hidden_states)
    return afcache.denoise(TRANSFORMER, inputs, sigmas, config=config, guidance_scale=scale, **options)


def uncached(inputs: FluxInputs, sigmas: Tensor, scale: float = 1.0) -> Tensor:
    """Diffusers' own forward and Euler's steps."""
    latents, text = inputs.hidden_states, inputs.encoder_hidden_states
    for sigma, sigma_next in itertools.pairwise(sigmas):
        velocities = []
        for states in (text, -text):
            placed = inputs._replace(encoder_hidden_states=states, hidden_states=latents, timestep=sigma.expand(len(latents)))
            velocities.append(TRANSFORMER(**flux1_inputs.host_arguments(placed), return_dict=False)[0])
        latents = latents + (sigma_next - sigma) * (velocities[1] + scale * (velocities[0] - velocities[1]))
    return latents


SCALES = st.sampled_from([1.0, 1.0, 2.0, 4.0, 0.5])
SIGMAS = cases.schedules(most=5)


@property_test(flux_inputs(), SIGMAS, any_config(careful=True), SCALES)
def test_tolerance_zero_and_policy_none_are_diffusers_own(inputs, sigmas, config, scale):
    result = denoise(inputs, sigmas, config, scale)
    assert result.pattern() == "F" * (len(sigmas) - 1)
    exact = uncached(inputs, sigmas, scale)
    assert float((result.latents - exact).abs().max()) < 1e-4 * float(exact.abs().max() + 1)


def one_sample(inputs: FluxInputs, index: int) -> FluxInputs:
    fields = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    return inputs._replace(**{name: getattr(inputs, name)[index : index + 1] for name in fields})


@property_test(flux_inputs(), SIGMAS, any_config(batch_decisions="independent"), SCALES)
def test_a_sample_is_the_same_alone_and_in_a_batch(inputs, sigmas, config, scale):
    together = denoise(inputs, sigmas, config, scale)
    for index in range(inputs.hidden_states.shape[0]):
        alone = denoise(one_sample(inputs, index), sigmas, config, scale)
        assert alone.pattern() == together.pattern(index)
        # Matrix products of another batch size round differently, and high orders amplify that.
        largest = float(alone.latents.abs().max()) + 1
        assert float((alone.latents[0] - together.latents[index]).abs().nan_to_num().max()) < 1e-2 * largest


@property_test(flux_inputs(), SIGMAS, any_config(), SCALES)
def test_records_tell_which_blocks_ran(inputs, sigmas, config, scale):
    calls = []

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(calls))
        return scaled_dot_product_attention(*args, **kwargs)

    counts = []

    def step(*args: Any, **kwargs: Any) -> Any:
        before = len(calls)
        result = denoising_step(*args, **kwargs)
        counts.append(len(calls) - before)
        return result

    result = denoise(inputs, sigmas, config, scale, kernel=kernel, step=step)
    branches = len(result.states)
    always = config.first_blocks + config.last_blocks
    for count, records in zip(counts, result.records, strict=True):
        assert len({tuple(record.refresh.tolist()) for record in records}) == 1
        if config.layerwise is not None:
            lengths = torch.tensor([len(chunk) for chunk in np.array_split(range(3), config.layerwise.groups)])
            groups: list[Any] = [record.groups for record in records]
            assert count == sum(int(lengths[group.is_computed].sum()) for group in groups)
        else:
            assert count == branches * (3 + config.last_blocks if bool(records[0].is_computed) else always)
    for state in result.states:
        batch, img_seq, channels = inputs.hidden_states.shape
        dim = channels if config.forecasts_output else 16
        sizes = {"batch": batch, "img_seq": img_seq, "txt_seq": inputs.txt_ids.shape[0], "dim": dim, "num_blocks": 3}
        afcache.check_state(state, config=config, channels=channels, **sizes)
        tensors = [tensor for tensor in pytree.tree_leaves(state) if isinstance(tensor, Tensor)]
        assert state_bytes(state) == sum(tensor.nbytes for tensor in tensors)


@property_test(flux_inputs(), SIGMAS, any_config(), SCALES, st.integers(1, 4))
def test_a_trajectory_left_and_gone_on_with_is_the_same(inputs, sigmas, config, scale, stop):
    whole = denoise(inputs, sigmas, config, scale)
    before = inputs.hidden_states.clone()
    if stop < len(sigmas) - 1:
        half = denoise(inputs, sigmas, config, scale, stop=stop)
        for _ in range(2):
            joined = denoise(inputs, sigmas, config, scale, start=half)
            assert torch.equal(joined.latents.nan_to_num(), whole.latents.nan_to_num())
            assert joined.pattern() == whole.pattern()
    assert torch.equal(inputs.hidden_states, before)


@st.composite
def uses(draw: st.DrawFn) -> dict[str, Any]:
    """A draw with a pipeline, which may be given up in the middle."""
    steps = draw(st.integers(1, 5))
    return {
        "which": draw(st.integers(0, 2)),
        "seed": draw(st.integers(0, 9)),
        "batch": draw(st.integers(1, 2)),
        "steps": steps,
        "cfg": draw(st.sampled_from([1.0, 2.0])),
        "size": draw(st.sampled_from([8, 16])),
        "end": draw(st.sampled_from([None, None, "abort", "interrupt"])),
        "at": draw(st.integers(0, steps - 1)),
    }


class GivenUpError(Exception):
    """What a callback raises in the middle of a draw."""


def use(pipes: list[Any], how: dict[str, Any]) -> np.ndarray | None:
    def callback(pipe: Any, index: int, _: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if how["end"] == "abort" and index == how["at"]:
            raise GivenUpError
        pipe._interrupt = how["end"] == "interrupt" and index >= how["at"]
        return kwargs

    seeds = [how["seed"] + index for index in range(how["batch"])]
    options = {"height": how["size"], "width": how["size"], "output_type": "latent", "callback_on_step_end": callback}
    prompts = ["a handwritten two on a palace"] * how["batch"]
    try:
        return sample(pipes[how["which"]], seeds, steps=how["steps"], cfg=how["cfg"], prompt=prompts, **options)
    except GivenUpError:
        return None


def small_pipe(config: CacheConfig) -> Any:
    pipe = fresh_mini_flux()
    pipe.set_progress_bar_config(disable=True)
    transformer: Any = pipe.transformer
    transformer.transformer_blocks = transformer.transformer_blocks[:1]
    transformer.single_transformer_blocks = transformer.single_transformer_blocks[:1]
    transformer.register_to_config(num_layers=1, num_single_layers=1)
    return afcache.compile_pipeline(pipe, config, compile=False)


@pytest.fixture(scope="module")
def pipes():
    configs = CacheConfig(tolerance=0.05, warmup_steps=2), CacheConfig(policy="fixed", interval=2), afcache.policy("noise")
    return list(map(small_pipe, configs))


PROBES: dict[str, tuple[np.ndarray | None, str]] = {}


@property_test(history=st.lists(uses(), max_size=2), probe=uses().map(lambda how: {**how, "end": None, "at": 0}))
def test_an_image_is_the_same_whatever_was_drawn_before(pipes, history, probe):
    pipe, key = pipes[probe["which"]], json.dumps(probe)
    if key not in PROBES:
        fresh = small_pipe(afcache.pipeline.bound_runtime(pipe.transformer).config)
        PROBES[key] = use([fresh] * len(pipes), probe), afcache.report(fresh).pattern()
    for how in history:
        use(pipes, how)
    image, pattern = PROBES[key]
    again = use(pipes, probe)
    assert image is not None
    assert again is not None
    assert np.array_equal(again, image)
    assert afcache.report(pipe).pattern() == pattern


@property_test(how=uses().map(lambda how: {**how, "end": None, "at": 0}))
def test_reports_tell_what_ran(pipes, how):
    pipe, ran = pipes[how["which"]], []
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    hooks = [block.attn.norm_q.register_forward_hook(lambda *_: ran.append(1)) for block in blocks]
    use(pipes, how)
    for hook in hooks:
        hook.remove()
    report, branches = afcache.report(pipe), 2 if how["cfg"] > 1 else 1
    assert report.num_steps == how["steps"] == len(report.pattern())
    assert len(report.steps) == how["steps"] * branches
    assert report.block_evaluations == len(ran) == sum(step.evaluations for step in report.steps)
    assert report.block_evaluations_uncached == 2 * how["steps"] * branches
    assert math.isclose(report.block_speedup * len(ran), report.block_evaluations_uncached)
    assert report.config == dataclasses.asdict(afcache.pipeline.bound_runtime(pipe.transformer).config)
    tokens = (how["size"] // 4) ** 2 * how["batch"]
    nodes = report.config["order"] + 1
    is_residual = report.config["target"] == "residual"
    width = pipe.transformer.inner_dim if is_residual else pipe.transformer.config.in_channels
    history = 4 * tokens * (nodes * width + pipe.transformer.config.in_channels)
    per_sample = nodes * 2 * 4 + 2 * 8 + (7 if report.config["learns_damping"] else 6) * 4
    assert report.state_bytes == branches * (history + per_sample * how["batch"])
    for step in report.steps:
        assert step.is_computed == any(step.refreshed)
        assert step.evaluations == (2 if step.is_computed else 0)
        assert all(math.isnan(error) for error, own in zip(step.measured_error, step.refreshed, strict=True) if not own)
        assert max(step.estimated_error) < report.config["tolerance"] * report.tolerance_scale or how["which"] == 1
        assert step.refreshed == next(other.refreshed for other in report.steps if other.step == step.step)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["pattern"] == report.pattern()


@property_test(sigma=numbers(0, 1), batch=st.integers(1, 3))
def test_the_forward_is_diffusers_own_at_any_noise_level(sigma, batch):
    source = torch.Generator().manual_seed(batch)
    shapes = {"hidden_states": (batch, 4, 8), "encoder_hidden_states": (batch, 3, 6), "pooled_projections": (batch, 5)}
    values: dict[str, Any] = {name: torch.randn(*shape, generator=source) for name, shape in shapes.items()}
    inputs = FluxInputs(
        **values, timestep=torch.full((batch,), sigma), img_ids=torch.ones(4, 3), txt_ids=torch.zeros(3, 3), guidance=None
    )
    ours = full_forward(model_of(TRANSFORMER, flux1.FLUX, scaled_dot_product_attention), inputs)
    host = TRANSFORMER(**flux1_inputs.host_arguments(inputs), return_dict=False)[0]
    torch.testing.assert_close(ours, host, rtol=0, atol=1e-5)
