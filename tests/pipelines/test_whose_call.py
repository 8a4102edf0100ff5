"""Whose call it is: images that are drawn side by side, inside each other or in threads are what they are alone."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import afcache
from afcache.calibration.metrics import psnr
from tests.support.leaps import PROMPTS, STEPS, Loop, embedded, prepared, with_own_scheduler
from tests.support.sampling import sample

pytestmark = pytest.mark.host

MODES = {"in the graph": {}, "decided ahead": {"decide_ahead": True}, "residuals": {"config": afcache.policy("residual")}}


def two_pipelines(own: Any, **options: Any) -> list[Any]:
    pipes = [own, with_own_scheduler(own)]
    for pipe in pipes:
        afcache.compile_pipeline(pipe, compile=False, **options)
    return pipes


def draw_encoded(pipe: Any, seed: int, inputs: dict[str, Tensor], keep_up: Callable[[], object]) -> np.ndarray:
    """An image of a prompt that was encoded before: tokenizers are not for two threads."""

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        del pipe, step, timestep, kwargs
        keep_up()
        return {}

    return pipe(
        prompt_embeds=inputs["encoder_hidden_states"],
        pooled_prompt_embeds=inputs["pooled_projections"],
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(seed),
        height=32,
        width=32,
        output_type="np",
        callback_on_step_end=callback,
    ).images


@pytest.mark.parametrize("mode", MODES)
def test_two_threads_with_a_pipeline_each_draw_what_they_draw_alone(own, mode: str):
    pipes = two_pipelines(own, **MODES[mode])
    prompts = [embedded(own, prompt) for prompt in PROMPTS]
    alone, patterns = [], []
    for seed, (pipe, inputs) in enumerate(zip(pipes, prompts, strict=True)):
        alone.append(draw_encoded(pipe, seed, inputs, lambda: None))
        patterns.append(afcache.report(pipe).pattern())
    for is_in_step in (True, False):
        barrier, drawn = threading.Barrier(2, timeout=60), {}

        def draw(
            seed: int, barrier: threading.Barrier = barrier, drawn: dict[int, Any] = drawn, wait: bool = is_in_step
        ) -> None:
            # In step, both schedulers fit every call.
            drawn[seed] = draw_encoded(pipes[seed], seed, prompts[seed], barrier.wait if wait else lambda: None)

        threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Where memory lies may change the last bit.
        assert all(np.allclose(drawn[seed], alone[seed], rtol=0, atol=1e-5) for seed in range(2))
        assert [afcache.report(pipe).pattern() for pipe in pipes] == patterns
        assert all(afcache.report(pipe).restarts == () for pipe in pipes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("step", [0, 3, 7])
def test_an_image_drawn_inside_anothers_callback_is_what_it_is_alone(own, step: int, mode: str):
    outer, inner = two_pipelines(own, **MODES[mode])
    alone = [sample(outer, 1, prompt=PROMPTS[0]), sample(inner, 2, prompt=PROMPTS[1])]
    drawn: list[np.ndarray] = []

    def draw_inside(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        del pipe, timestep, kwargs
        if index == step:
            drawn.append(sample(inner, 2, prompt=PROMPTS[1]))
        return {}

    image = sample(outer, 1, prompt=PROMPTS[0], callback_on_step_end=draw_inside)
    assert np.array_equal(image, alone[0])
    assert np.array_equal(drawn[0], alone[1])
    for pipe in (outer, inner):
        assert afcache.report(pipe).num_steps == STEPS
        assert afcache.report(pipe).restarts == ()


def test_loops_that_take_turns_over_one_schedule_draw_what_they_draw_alone(own):
    afcache.compile_pipeline(own, compile=False)
    prompts = [embedded(own, prompt) for prompt in PROMPTS]

    def loops() -> list[Loop]:
        scheduler = prepared(own)
        return [Loop(own, scheduler, seed, **inputs) for seed, inputs in enumerate(prompts)]

    alone = loops()
    for loop in alone:
        for index in range(STEPS):
            loop.step(index)
    together = loops()
    for index in range(STEPS):
        for loop in together:
            loop.step(index)
    assert all(torch.equal(one.latents, other.latents) for one, other in zip(together, alone, strict=True))


def test_one_pipeline_in_two_threads_is_an_error_never_another_image(own):
    afcache.compile_pipeline(own, compile=False)
    expected = sample(own, 1, prompt=PROMPTS[0])
    outcomes: dict[str, Any] = {}
    inner_started, outer_may_go_on = threading.Event(), threading.Event()

    def wait_for(index: int, event: threading.Event, then: threading.Event | None) -> Callable[..., dict[str, Any]]:
        def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            del pipe, timestep, kwargs
            if step == index:
                if then is not None:
                    then.set()
                event.wait(20)
            return {}

        return callback

    def draw(name: str, callback: Any) -> None:
        try:
            outcomes[name] = sample(own, 1, prompt=PROMPTS[0], callback_on_step_end=callback)
        except RuntimeError as error:
            outcomes[name] = error

    first = threading.Thread(target=draw, args=("first", wait_for(5, outer_may_go_on, inner_started)))
    second = threading.Thread(target=draw, args=("second", wait_for(8, inner_started, outer_may_go_on)))
    first.start()
    inner_started.wait(20)
    second.start()
    for thread in (first, second):
        thread.join(60)
    errors = [str(each) for each in outcomes.values() if isinstance(each, RuntimeError)]
    images = [each for each in outcomes.values() if isinstance(each, np.ndarray)]
    assert errors
    assert all("scheduler of its own" in error for error in errors)
    assert all(np.array_equal(image, expected) for image in images)


@pytest.mark.parametrize("same_prompt", [True, False])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_preview_in_a_callback_does_not_lead(own, cfg: float, same_prompt: bool):
    inputs = embedded(own, PROMPTS[0] if same_prompt else PROMPTS[1])
    plain = sample(own, 1, cfg=cfg, prompt=PROMPTS[0])
    afcache.compile_pipeline(own, compile=False)
    expected = sample(own, 1, cfg=cfg, prompt=PROMPTS[0])
    pattern = afcache.report(own).pattern()

    def preview(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        del timestep
        if index in (4, 5, 9, 15, 20):
            timesteps = pipe.scheduler.timesteps[index + 1].expand(1) / 1000
            pipe.transformer(kwargs["latents"], timestep=timesteps, return_dict=False, **inputs)
        return {}

    watched = {"callback_on_step_end": preview, "callback_on_step_end_tensor_inputs": ["latents"]}
    with torch.no_grad():
        image = sample(own, 1, cfg=cfg, prompt=PROMPTS[0], **watched)
    assert psnr(image[0], plain[0]) > psnr(expected[0], plain[0]) - 1
    report = afcache.report(own)
    # A stranger with the prompt of the leader may be a third branch of guidance: two steps more may be computed.
    assert report.pattern().count("F") <= pattern.count("F") + (10 if same_prompt else 0)
    assert report.num_steps == STEPS


def test_a_loop_given_up_after_its_first_call_leaves_the_next_as_it_is(own):
    afcache.compile_pipeline(own, compile=False)
    inputs = embedded(own)

    def draw(*, aborted: bool) -> Tensor:
        scheduler = prepared(own)
        if aborted:
            Loop(own, scheduler, 7, **inputs).velocity(0)
        loop = Loop(own, scheduler, 1, **inputs)
        for index in range(STEPS):
            loop.step(index)
        return loop.latents

    assert torch.equal(draw(aborted=True), draw(aborted=False))
