"""ControlNets: several, switched within an image, called at some steps only, with residuals that go round."""

from typing import Any

import pytest
import torch
from diffusers import FluxControlNetPipeline
from diffusers.models.controlnets.controlnet_flux import FluxMultiControlNetModel

import afcache
from tests.support.mini_flux import fresh_mini_flux
from tests.support.one_graph import MIXED, TRACED, assert_exact_and_one_graph, counters
from tests.support.pipelines import BY_NAME, draw, make, make_controlnet, picture

pytestmark = pytest.mark.host


@pytest.mark.parametrize("limits", [{"control_guidance_end": 0.5}, {"control_guidance_start": 0.5}])
def test_a_step_at_which_a_controlnet_is_switched_is_computed(limits: dict[str, Any]):
    kind = BY_NAME["FluxControlNetPipeline"]
    pipe = make(kind)
    expected = draw(pipe, kind, **limits)
    always = afcache.policy("fixed", interval=100, warmup_steps=2)
    afcache.compile_pipeline(pipe, always, compile=False)
    draw(pipe, kind)
    assert afcache.report(pipe).pattern() == "FF.........."
    draw(pipe, kind, **limits)
    assert afcache.report(pipe).pattern() == "FF....F....."
    afcache.compile_pipeline(pipe, tolerance=0.0, compile=False)
    assert (draw(pipe, kind, **limits) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("comes", ["late", "early"])
def test_a_controlnet_that_is_not_always_called(comes: str):
    """Pipelines of one's own: residuals at some steps, none at others. Guards are left out from the third step on."""
    kind = BY_NAME["FluxControlNetPipeline"]
    pipe = make(kind, double=1, single=1)

    def switch(transformer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        is_late = bool(kwargs["timestep"][0] < 0.6)
        none = {"controlnet_block_samples": None, "controlnet_single_block_samples": None}
        return args, (kwargs if is_late == (comes == "late") else {**kwargs, **none})

    pipe.transformer.register_forward_pre_hook(switch, with_kwargs=True)
    expected = draw(pipe, kind)
    afcache.compile_pipeline(pipe, tolerance=0.0, backend=TRACED)
    assert (draw(pipe, kind) - expected).abs().max() < 1e-4
    # Once with residuals and once without.
    assert counters()["stats"]["unique_graphs"] == 2
    afcache.compile_pipeline(pipe, MIXED, compile=False)
    assert (draw(pipe, kind) - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("limits", [{"control_guidance_end": 0.5}, {"control_guidance_start": 0.5}])
@pytest.mark.parametrize("correction", [True, False])
def test_the_jump_of_a_switched_controlnet_is_no_error_to_catch_up_with(limits: dict[str, Any], correction: bool):
    """With the history of the other velocity this was off by 0.09 to 0.12, and by 0.06 to 0.08."""
    kind = BY_NAME["FluxControlNetPipeline"]
    pipe = make(kind)
    expected = draw(pipe, kind, **limits)
    afcache.compile_pipeline(pipe, afcache.policy("taylorseer", interval=3, correction=correction), compile=False)
    assert (draw(pipe, kind, **limits) - expected).norm() < 0.07 * expected.norm()
    assert afcache.report(pipe).pattern()[6] == "F"


def test_several_controlnets_and_their_scales():
    kind = BY_NAME["FluxControlNetPipeline"]
    pipe = make(kind, single=1)
    second = make_controlnet(fresh_mini_flux().transformer, double=2, single=0)
    pipe.controlnet = FluxMultiControlNetModel([pipe.controlnet, second])
    changes: dict[str, Any] = {
        "control_image": [picture(), picture(1)],
        "controlnet_conditioning_scale": [0.7, 0.4],
        "control_mode": [None, None],
    }
    assert_exact_and_one_graph(pipe, kind, **changes)


def test_residuals_for_reference_images():
    """No pipeline of diffusers has both; its transformer adds residuals to all tokens, reference images last."""
    kind = BY_NAME["FluxKontextPipeline"]
    pipe = make(kind)

    def control(transformer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        generator, seq = torch.Generator().manual_seed(0), kwargs["hidden_states"].shape[1]
        double, single = (0.3 * torch.randn(2, 1, seq, transformer.inner_dim, generator=generator)).unbind()
        return args, {**kwargs, "controlnet_block_samples": [double], "controlnet_single_block_samples": [single]}

    pipe.transformer.register_forward_pre_hook(control, with_kwargs=True)
    expected = draw(pipe, kind)
    afcache.compile_pipeline(pipe, tolerance=0.0, compile=False)
    assert (draw(pipe, kind) - expected).abs().max() < 1e-4


def test_a_controlnet_whose_residuals_go_round():
    """Xlabs' kind: the transformer is told to repeat them over its blocks."""
    kind = BY_NAME["FluxControlNetPipeline"]
    pipe = make(kind, double=3, single=1)
    pipe.controlnet = make_controlnet(fresh_mini_flux().transformer, double=2, single=0)
    repeats: list[bool] = []

    def repeat(transformer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        repeats.append(True)
        return args, {**kwargs, "controlnet_blocks_repeat": True}

    spread_out = draw(pipe, kind)
    pipe.transformer.register_forward_pre_hook(repeat, with_kwargs=True)
    assert_exact_and_one_graph(pipe, kind)
    assert (draw(pipe, kind) - spread_out).abs().max() > 1e-3
    assert repeats


def test_a_pipeline_made_from_a_cached_one_is_cached():
    kind = BY_NAME["FluxControlNetPipeline"]
    pipe = make(BY_NAME["FluxPipeline"])
    afcache.compile_pipeline(pipe, tolerance=0.0, compile=False)
    other = FluxControlNetPipeline.from_pipe(pipe, controlnet=make_controlnet(pipe.transformer))
    with afcache.uncached(other):
        expected = draw(other, kind)
    assert (draw(other, kind) - expected).abs().max() < 1e-4
    assert afcache.report(other).num_steps == 12
