"""Every pipeline class that runs a FLUX.1 transformer: exact at tolerance 0, one graph with mixed decisions."""

import itertools
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import afcache
from afcache import CacheConfig, FluxInputs
from afcache.models.flux1 import call as flux1_call
from tests.support.one_graph import MIXED, TRACED, assert_exact_and_one_graph, assert_exact_and_share_a_graph, counters
from tests.support.pipelines import BY_NAME, KINDS, Kind, draw, make, picture

pytestmark = pytest.mark.host


# Pipelines whose transformers are called alike, with and without true CFG: one compiled step serves them all.
ALIKE = {
    "text": ["FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"],
    "fill": ["FluxFillPipeline"],
    "control": ["FluxControlPipeline", "FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline"],
    "ControlNet": ["FluxControlNetPipeline", "FluxControlNetImg2ImgPipeline", "FluxControlNetInpaintPipeline"],
    "Kontext": ["FluxKontextPipeline", "FluxKontextInpaintPipeline"],
}


@pytest.mark.parametrize("name", [name for names in ALIKE.values() for name in names])
def test_pipelines_whose_residuals_are_forecast_and_whose_forward_is_the_hosts(name: str):
    """Exact at tolerance 0; then some steps are saved."""
    kind = BY_NAME[name]
    pipe = make(kind, single=1)
    expected = draw(pipe, kind)
    ways: tuple[Any, ...] = (("residual", False), ("noise", "blocks"))
    for target, compile in ways:
        exact = afcache.policy(target, tolerance=0.0)
        afcache.compile_pipeline(pipe, exact, compile=compile, backend="eager")
        assert float((draw(pipe, kind) - expected).abs().max()) < 1e-4
        afcache.compile_pipeline(pipe, afcache.policy(target, tolerance=0.1), compile=compile, backend="eager")
        assert torch.isfinite(draw(pipe, kind)).all()
        assert {"F", "."} <= set(afcache.report(pipe).pattern())


@pytest.mark.parametrize("names", ALIKE.values(), ids=ALIKE)
def test_pipelines(names: list[str]):
    first = make(BY_NAME[names[0]], single=1)
    parts = {name: part for name, part in first.components.items() if part is not None}
    draws: list[tuple[Any, Kind, dict[str, Any]]] = []
    for name in names:
        kind = BY_NAME[name]
        pipe = first if name == names[0] else getattr(diffusers, name)(**parts)
        pipe.set_progress_bar_config(disable=True)
        draws.append((pipe, kind, {}))
        if kind.guided:
            draws.append((pipe, kind, {"true_cfg_scale": 2.0, "negative_prompt": ""}))
    # Fewer steps, and noise levels of the caller's own.
    draws.append((first, BY_NAME[names[0]], {"sigmas": [1.0, 0.9, 0.8, 0.7, 0.6, 0.45, 0.3, 0.2, 0.1]}))
    assert_exact_and_share_a_graph(draws)


def test_no_pipeline_is_left_out():
    assert sorted(itertools.chain(*ALIKE.values())) == sorted(kind.name for kind in KINDS)


@pytest.mark.parametrize(
    ("name", "policy"),
    [("FluxControlNetPipeline", "dbcache"), ("FluxControlNetPipeline", "layerwise"), ("FluxKontextPipeline", "dbcache")],
)
def test_other_ways_through_the_blocks_are_exact_too(name: str, policy: str):
    """Policies that run the stack part by part; a threshold of 0 computes every step."""
    kind = BY_NAME[name]
    pipe = make(kind)
    expected = draw(pipe, kind)
    of_ends = {"threshold": 0.0, "first_blocks": 1, "last_blocks": 1}
    changes: dict[str, Any] = of_ends if policy == "dbcache" else {"tolerance": 0.0}
    afcache.compile_pipeline(pipe, afcache.policy(policy, **changes), compile=False)
    assert (draw(pipe, kind) - expected).abs().max() < 1e-4
    assert set(afcache.report(pipe).pattern()) == {"F"}


def test_reference_images_are_context_and_no_part_of_the_state():
    kind = BY_NAME["FluxKontextPipeline"]
    pipe = make(kind)
    afcache.compile_pipeline(pipe, MIXED, compile=False)
    draw(pipe, kind)
    with_reference = afcache.report(pipe)
    draw(pipe, kind, image=None)
    without = afcache.report(pipe)
    assert with_reference.state_bytes == without.state_bytes
    assert set(with_reference.pattern()) == {"F", "."}
    # A second reference image of another size is another context, and the image is drawn anew.
    assert not torch.equal(draw(pipe, kind, image=picture(5)), draw(pipe, kind))


@pytest.mark.parametrize("name", ["FluxFillPipeline", "FluxControlPipeline", "FluxKontextPipeline"])
def test_the_functional_step_draws_what_pipelines_draw(name: str):
    """Without a pipeline, what stands beside the latents has fields of its own: channels a condition, tokens a context."""
    kind = BY_NAME[name]
    pipe = make(kind, single=1)
    calls: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *call: calls.append(call[2]), with_kwargs=True)
    expected = draw(pipe, kind)
    hook.remove()
    first = {name: calls[0][name] for name in FluxInputs._fields if name in calls[0]}
    inputs = flux1_call.split_context(FluxInputs(**first), 64 if name == "FluxKontextPipeline" else 0)
    if name != "FluxKontextPipeline":
        shown = inputs.hidden_states
        inputs = inputs._replace(hidden_states=shown[..., :32].contiguous(), condition=shown[..., 32:].contiguous())
    step = torch.compile(afcache.denoising_step, fullgraph=True, backend="aot_eager")
    mixed = afcache.denoise(pipe.transformer, inputs, pipe.scheduler.sigmas, config=MIXED, step=step)
    assert set(mixed.pattern()) == {"F", "."}
    assert counters()["stats"]["unique_graphs"] == 1
    exact = afcache.denoise(pipe.transformer, inputs, pipe.scheduler.sigmas, config=CacheConfig(tolerance=0.0))
    assert (exact.latents - expected).abs().max() < 1e-4


def test_what_the_functional_step_cannot_keep_from_step_to_step_is_refused():
    fill, control = (make(BY_NAME[name]).transformer for name in ("FluxFillPipeline", "FluxControlNetPipeline"))
    sigmas, ids = torch.linspace(1, 0, 6), torch.zeros(4, 3)
    wide = FluxInputs(
        torch.zeros(1, 4, 80), torch.zeros(1, 2, 64), torch.zeros(1, 64), torch.ones(1), ids, ids[:2], torch.ones(1)
    )
    with pytest.raises(ValueError, match=r"latents' 32 channels and inputs\.condition the other 48 .* got 80 and 0"):
        afcache.denoise(fill, wide, sigmas)
    narrow = wide._replace(hidden_states=torch.zeros(1, 4, 32), guidance=None)
    with pytest.raises(ValueError, match=r"inputs\.condition must be None for this transformer, got 32 and 32"):
        afcache.denoise(control, narrow._replace(condition=narrow.hidden_states), sigmas)
    with pytest.raises(ValueError, match="a ControlNet's residuals are others at every step"):
        afcache.denoise(control, narrow._replace(controlnet_block_samples=(torch.zeros(1, 4, 64),)), sigmas)
    reference = narrow._replace(context=narrow.hidden_states, context_ids=ids)
    with pytest.raises(NotImplementedError, match=r"groups of blocks \(Layerwise\)"):
        afcache.denoise(control, reference, sigmas, config=afcache.policy("layerwise", groups=2))


def test_groups_of_blocks_refuse_reference_images():
    kind = BY_NAME["FluxKontextPipeline"]
    pipe = afcache.compile_pipeline(make(kind), afcache.policy("layerwise", groups=2), compile=False)
    with pytest.raises(NotImplementedError, match=r"groups of blocks \(Layerwise\) do not know reference images"):
        draw(pipe, kind)


def test_a_prompt_exchanged_by_a_callback_starts_the_cache_again():
    kind = BY_NAME["FluxPipeline"]
    pipe = make(kind)
    other = pipe.encode_prompt("a handwritten seven on a flower", None, max_sequence_length=16)[0]

    def exchange(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": other} if step == 4 else {"prompt_embeds": tensors["prompt_embeds"].clone()}

    afcache.compile_pipeline(pipe, afcache.policy("fixed", interval=100, warmup_steps=2), compile=False)
    draw(pipe, kind, callback_on_step_end=exchange, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    # At step 5, and nowhere else: clones are the same prompt.
    assert afcache.report(pipe).pattern() == "FF...F......"


@pytest.mark.parametrize(
    "changes",
    [
        {"max_sequence_length": 7},
        {"num_images_per_prompt": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_arguments_of_a_call(changes: dict[str, Any]):
    kind = BY_NAME["FluxPipeline"]
    assert_exact_and_one_graph(make(kind, single=1), kind, backend=TRACED, **changes)


@pytest.mark.parametrize("name", ["FluxPipeline", "FluxFillPipeline", "FluxControlNetPipeline", "FluxKontextPipeline"])
def test_callbacks_and_interrupts_are_the_pipelines_own(name: str):
    kind = BY_NAME[name]
    pipe = make(kind)
    seen: list[int] = []

    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        pipe._interrupt = step == 4
        return {"latents": tensors["latents"] * 1.01}

    changes: dict[str, Any] = {"callback_on_step_end": interrupt, "callback_on_step_end_tensor_inputs": ["latents"]}
    whole, expected = draw(pipe, kind), draw(pipe, kind, **changes)
    afcache.compile_pipeline(pipe, tolerance=0.0, compile=False)
    assert (draw(pipe, kind, **changes) - expected).abs().max() < 1e-4
    assert afcache.report(pipe).num_steps == 5
    assert seen == 2 * [0, 1, 2, 3, 4]
    # The next image is whole again.
    assert (draw(pipe, kind) - whole).abs().max() < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_three_steps_or_fewer_lose_nothing(steps: int):
    """schnell: no shift of the schedule, no distilled guidance."""
    kind = BY_NAME["FluxPipeline"]
    pipe = make(kind)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    expected = draw(pipe, kind, steps=steps)
    choices: list[dict[str, Any]] = [{"preset": "quality"}, {"preset": "fast"}, {"tolerance": 1e9}]
    for choice in choices:
        afcache.compile_pipeline(pipe, **choice, compile=False)
        assert (draw(pipe, kind, steps=steps) - expected).abs().max() < 1e-4
        report = afcache.report(pipe)
        assert report.pattern() == "F" * steps
        assert "Nothing was saved" in str(report)
