"""What pipelines switch in the middle of an image: the cache starts again there, exactly, and in the same graph."""

from typing import Any

import pytest
import torch
from diffusers.models.controlnets.controlnet_flux import FluxMultiControlNetModel

import afcache
from afcache.runtime.controls import Controls, controls_of
from tests.support.mini_flux import fresh_mini_flux
from tests.support.one_graph import TRACED, assert_exact_and_one_graph, assert_exact_and_share_a_graph
from tests.support.pipelines import BY_NAME, draw, load_ip_adapters, make, make_controlnet, picture

pytestmark = pytest.mark.host
ALWAYS = afcache.policy("fixed", interval=100, warmup_steps=2)
CONTROLNET = BY_NAME["FluxControlNetPipeline"]


def two_controlnets(**sizes: int) -> Any:
    pipe = make(CONTROLNET, **sizes)
    second = make_controlnet(fresh_mini_flux().transformer, double=2, single=0)
    pipe.controlnet = FluxMultiControlNetModel([pipe.controlnet, second])
    return pipe


def of_two(**limits: Any) -> dict[str, Any]:
    pictures = [picture(), picture(1)]
    return {
        "control_image": pictures,
        "controlnet_conditioning_scale": [0.7, 0.4],
        "control_mode": [None, None],
        **limits,
    }


def exchanging(step_of_exchange: int, name: str, change: Any) -> dict[str, Any]:
    """A callback that changes one of the pipeline's tensors after a step."""

    def exchange(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        del pipe, timestep
        return {name: change(tensors[name])} if step == step_of_exchange else {}

    return {"callback_on_step_end": exchange, "callback_on_step_end_tensor_inputs": [name]}


def pattern(pipe: Any, kind: Any = CONTROLNET, **changes: Any) -> str:
    draw(pipe, kind, **changes)
    return afcache.report(pipe).pattern()


FIRST_ENDS = of_two(control_guidance_end=[0.5, 1.0])
CASES: dict[str, dict[str, Any]] = {
    "control_guidance_end": {"control_guidance_end": 0.5},
    "control_guidance_start": {"control_guidance_start": 0.5},
    "control_image": exchanging(5, "control_image", torch.neg),
    "prompt_embeds": exchanging(5, "prompt_embeds", torch.neg),
    "prompt_embeds in place": exchanging(5, "prompt_embeds", lambda tensor: tensor.neg_()),
    "latents": exchanging(5, "latents", lambda tensor: 1.01 * tensor),
}


def test_switches_are_exact_and_share_a_graph():
    pipe = make(CONTROLNET, double=1, single=1)
    assert_exact_and_share_a_graph([(pipe, CONTROLNET, changes) for changes in CASES.values()], TRACED)


@pytest.mark.parametrize("name", [name for name in CASES if name != "latents"])
def test_the_step_after_a_switch_is_computed(name: str):
    pipe = afcache.compile_pipeline(make(CONTROLNET), ALWAYS, compile=False)
    assert pattern(pipe) == "FF.........."
    assert pattern(pipe, **CASES[name]) == "FF....F....."


def test_one_of_several_controlnets_that_switches_is_exact_and_one_graph():
    assert_exact_and_one_graph(two_controlnets(double=1, single=1), CONTROLNET, backend=TRACED, **FIRST_ENDS)


@pytest.mark.parametrize("limits", [{"control_guidance_end": [0.5, 1.0]}, {"control_guidance_start": [0.0, 0.5]}])
def test_one_of_several_controlnets_that_switches_starts_the_cache_again(limits: dict[str, Any]):
    pipe = afcache.compile_pipeline(two_controlnets(), ALWAYS, compile=False)
    assert pattern(pipe, **of_two()) == "FF.........."
    assert pattern(pipe, **of_two(**limits)) == "FF....F....."


def test_a_controlnet_put_in_later_is_watched_and_none_is_after_restoring():
    pipe = afcache.compile_pipeline(make(CONTROLNET), ALWAYS, compile=False)
    before = pipe.controlnet
    pipe.controlnet = make_controlnet(fresh_mini_flux().transformer)
    assert pattern(pipe, **CASES["control_image"]) == "FF....F....."
    assert len(pipe.controlnet._forward_pre_hooks) == 1
    pipe.controlnet = before
    afcache.restore_pipeline(pipe)
    assert not pipe.controlnet._forward_pre_hooks
    assert controls_of([pipe]) == Controls()


def test_image_prompts_that_are_rescaled_are_one_graph_with_mixed_decisions():
    kind = BY_NAME["FluxPipeline"]
    pipe = make(kind, double=1, single=1)
    load_ip_adapters(pipe, 1)

    def fade(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        del timestep, tensors
        pipe.set_ip_adapter_scale(0.5 if step < 5 or step == 11 else 0.2)
        return {}

    prompts = {name: [torch.ones(1, 1, 16)] for name in ("ip_adapter_image_embeds", "negative_ip_adapter_image_embeds")}
    pipe.set_ip_adapter_scale(0.5)
    assert_exact_and_one_graph(pipe, kind, backend=TRACED, callback_on_step_end=fade, **prompts)
    assert afcache.report(pipe).pattern()[6] == "F"


def test_a_pipeline_made_from_another_is_exact_and_one_graph():
    other = type(make(CONTROLNET)).from_pipe(
        afcache.compile_pipeline(make(BY_NAME["FluxPipeline"], double=1, single=1), compile=False),
        controlnet=make_controlnet(fresh_mini_flux().transformer),
    )
    other.set_progress_bar_config(disable=True)
    afcache.restore_pipeline(other)
    assert_exact_and_one_graph(other, CONTROLNET, backend=TRACED)


def test_few_steps_compiled_lose_nothing():
    kind = BY_NAME["FluxPipeline"]
    pipe = make(kind, double=1, single=1)
    expected = draw(pipe, kind, steps=3)
    afcache.compile_pipeline(pipe, backend="aot_eager")
    for steps in (3, 1, 3):
        image = draw(pipe, kind, steps=steps)
        assert afcache.report(pipe).pattern() == "F" * steps
    assert (image - expected).abs().max() < 1e-4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
