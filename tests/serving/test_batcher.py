"""Many requests at once: each is what it is alone, whatever becomes of its neighbours."""

import asyncio
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FluxInpaintPipeline

import afcache
from afcache.serving import batcher as batcher_module
from afcache.serving import engine as engine_module
from afcache.serving.batcher import Batcher
from afcache.serving.engine import Engine
from afcache.serving.intake import depart
from bench.mini_flux.sampling import SETTINGS
from tests.support.sampling import largest_difference, page_example
from tests.support.zoo import qwen_image

pytestmark = pytest.mark.host
TOLERANCES = (0.005, 0.01, 0.03)
PATIENT = 120


def arguments(number: int, **changes: Any) -> dict[str, Any]:
    """Of different steps; every other one is guided."""
    guided = {"true_cfg_scale": 2.0, "negative_prompt": ""} if number % 2 else {}
    return {
        "prompt": f"a handwritten {('two', 'five', 'nine')[number % 3]} over grass",
        "num_inference_steps": (9, 14, 20)[number % 3],
        "generator": torch.Generator().manual_seed(number),
        "output_type": "latent",
        **SETTINGS,
        **guided,
        **changes,
    }


def alone(pipe: Any, number: int, tolerance: float) -> tuple[Any, str]:
    afcache.compile_pipeline(pipe, tolerance=tolerance, compile=False)
    image = pipe(**arguments(number)).images[0]
    pattern = afcache.report(pipe).pattern()
    afcache.restore_pipeline(pipe)
    return image, pattern


@pytest.mark.parametrize("is_compiled", [False, True])
def test_requests_are_what_they_are_alone(pipe, short, is_compiled: bool):
    host = short if is_compiled else pipe
    count = 4 if is_compiled else 8
    expected = [alone(host, number, TOLERANCES[number % 3]) for number in range(count)]
    with Batcher(host, max_batch=4, compile=is_compiled, backend="aot_eager") as batcher:
        handles = [batcher.submit(tolerance=TOLERANCES[number % 3], **arguments(number)) for number in range(count)]
        served = [handle.result(PATIENT) for handle in handles]
        metrics = batcher.metrics()
    for (image, pattern), result in zip(expected, served, strict=True):
        assert result.pattern == pattern
        assert largest_difference(result.image.numpy(), image.numpy()) < 1e-4
    assert metrics["requests_finished"] == count
    assert metrics["refreshes_saved"] == sum(pattern.count(".") for _, pattern in expected) > 0
    # Two kinds of requests, so that calls are shared by half of them at most.
    assert 1 / 4 < metrics["batch_fill"] <= 1
    assert metrics["state_bytes"] == 0


def test_pictures_of_other_sides_keep_their_positions(pipe):
    """As many tokens, at other places: they share no call."""
    wide, high = arguments(0, height=32, width=64), arguments(0, height=64, width=32)
    expected = [pipe(**sides).images[0] for sides in (wide, high)]
    with Batcher(pipe, tolerance=0.0) as batcher:
        handles = [batcher.submit(**arguments(0, height=height, width=96 - height)) for height in (32, 64)]
        served = [handle.result(PATIENT).image for handle in handles]
    assert largest_difference(expected[0].numpy(), expected[1].numpy()) > 0.1
    for mine, theirs in zip(served, expected, strict=True):
        assert largest_difference(mine.numpy(), theirs.numpy()) < 1e-4


PLANS = [
    afcache.policy("fixed", interval=4),
    afcache.CacheConfig(policy="planned", refresh_steps=(6,), warmup_steps=2),
    afcache.CacheConfig(policy="growing", interval=2, interval_growth=0.5),
    afcache.CacheConfig(policy="none"),
]


@pytest.mark.parametrize("config", PLANS, ids=lambda config: config.policy)
def test_plans_are_kept(pipe, config: afcache.CacheConfig):
    afcache.compile_pipeline(pipe, config, compile=False)
    expected = pipe(**arguments(1)).images[0]
    pattern = afcache.report(pipe).pattern()
    afcache.restore_pipeline(pipe)
    with Batcher(pipe, config=config) as batcher:
        served = batcher.submit(**arguments(1)).result(PATIENT)
        with pytest.raises(ValueError, match="known beforehand"):
            batcher.submit(tolerance=0.01, **arguments(1))
    assert served.pattern == pattern
    assert largest_difference(served.image.numpy(), expected.numpy()) < 1e-4


def test_generators_may_be_used_again_at_once(pipe):
    expected = [pipe(**arguments(number)).images[0] for number in (0, 3)]
    generator = torch.Generator()
    with Batcher(pipe, tolerance=0.0) as batcher:
        handles = [batcher.submit(**arguments(number, generator=generator.manual_seed(number))) for number in (0, 3)]
        served = [handle.result(PATIENT).image for handle in handles]
    for mine, theirs in zip(served, expected, strict=True):
        assert largest_difference(mine.numpy(), theirs.numpy()) < 1e-4


def test_a_scale_without_a_negative_prompt_counts_for_nothing(pipe):
    expected = pipe(**arguments(0)).images[0]
    with Batcher(pipe, tolerance=0.0) as batcher:
        others = arguments(0, true_cfg_scale=2.0)
        # The prompt may be given by place, as to the pipeline.
        served = batcher.submit(others.pop("prompt"), **others).result(PATIENT)
    assert largest_difference(served.image.numpy(), expected.numpy()) < 1e-4


def test_images_are_decoded_as_the_pipeline_does_it(pipe):
    expected = pipe(**arguments(1, output_type="np")).images[0]
    with Batcher(pipe, tolerance=0.0) as batcher:
        served = batcher.submit(**arguments(1, output_type="np")).result(PATIENT)
    assert served.image.shape == expected.shape
    assert largest_difference(served.image, expected) < 1e-4
    assert served.pattern == "F" * 14


def test_the_pages_requests_run(capsys):
    scope: dict[str, Any] = {}
    exec(page_example("afcache.Batcher(", page="serving"), scope)
    assert len(scope["images"]) == 2
    assert "refreshes_saved" in capsys.readouterr().out


def test_who_fails_fails_alone(pipe, monkeypatch):
    """One has arguments that the pipeline refuses, one makes every call fail that it is part of."""
    step = engine_module.served_step

    def fragile(transformer: Any, inputs: Any, latents: Any, *rest: Any, **known: Any) -> Any:
        if bool((latents.flatten(1).mean(1) > 5).any()):
            raise RuntimeError("out of luck")
        return step(transformer, inputs, latents, *rest, **known)

    monkeypatch.setattr(engine_module, "served_step", fragile)
    with Batcher(pipe, max_batch=4) as batcher:
        good = [batcher.submit(**arguments(number)) for number in (0, 2, 4)]
        strange = batcher.submit(**arguments(0, prompt=3))
        unlucky = batcher.submit(**arguments(0, latents=torch.full((1, 64, 32), 10.0)))
        assert all("." in handle.result(PATIENT).pattern for handle in good)
        with pytest.raises(ValueError, match="prompt"):
            strange.result(PATIENT)
        with pytest.raises(RuntimeError, match="out of luck"):
            unlucky.result(PATIENT)
        metrics = batcher.metrics()
        assert not batcher._departures
    assert (metrics["requests_finished"], metrics["requests_failed"]) == (3, 2)


def test_a_cancelled_request_leaves_and_the_others_stay(pipe):
    with Batcher(pipe, max_batch=2) as batcher:
        handles = [batcher.submit(**arguments(number, num_inference_steps=40)) for number in (0, 2, 4)]
        assert handles[1].cancel()
        assert not handles[1].cancel()
        with pytest.raises(CancelledError):
            handles[1].result(PATIENT)
        assert all(len(handles[index].result(PATIENT).pattern) == 40 for index in (0, 2))
        assert not handles[0].cancel()
        metrics = batcher.metrics()
    assert (metrics["requests_finished"], metrics["requests_cancelled"], metrics["state_bytes"]) == (2, 1, 0)


def test_requests_can_be_awaited(pipe):
    async def draw_two(batcher: Batcher) -> list[str]:
        results = await asyncio.gather(*(batcher.submit(**arguments(number)) for number in (0, 1)))
        return [result.pattern for result in results]

    with Batcher(pipe) as batcher:
        assert [len(pattern) for pattern in asyncio.run(draw_two(batcher))] == [9, 14]


def test_who_stops_awaiting_gives_up(pipe):
    async def hurry(batcher: Batcher) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_result(batcher.submit(**arguments(0, num_inference_steps=900))), 0.2)

    with Batcher(pipe, max_requests=1) as batcher:
        asyncio.run(hurry(batcher))
        # Its place is free.
        assert batcher.submit(**arguments(1)).result(PATIENT).pattern
        metrics = batcher.metrics()
    assert (metrics["requests_cancelled"], metrics["requests_finished"]) == (1, 1)


async def _result(handle: Any) -> Any:
    return await handle


def test_whatever_stops_the_intake_is_told(pipe, monkeypatch):
    class PanicError(BaseException):
        """As those of other languages."""

    def panic(*_: Any) -> None:
        raise PanicError("no tokens")

    monkeypatch.setattr(batcher_module, "depart", panic)
    with Batcher(pipe) as batcher:
        with pytest.raises(PanicError):
            batcher.submit(**arguments(0)).result(PATIENT)
        assert batcher.metrics()["requests_failed"] == 1


def test_there_is_room_for_so_many(pipe):
    with Batcher(pipe, max_requests=1) as batcher:
        first = batcher.submit(**arguments(0, num_inference_steps=40))
        with pytest.raises(afcache.BusyError, match="max_requests"):
            batcher.submit(wait=False, **arguments(1))
        # It waits for its place.
        assert batcher.submit(**arguments(1)).result(PATIENT).pattern
        assert first.done()
        assert first.progress() == (0, 0, "")
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(**arguments(0))


def test_other_families_are_refused_by_name():
    pipe = qwen_image.make("QwenImagePipeline")
    with pytest.raises(NotImplementedError, match="QwenImagePipeline with QwenImageTransformer2DModel cannot share calls"):
        Batcher(pipe)


def test_pipelines_that_do_more_than_step_are_refused_by_name(pipe):
    with pytest.raises(NotImplementedError, match="FluxInpaintPipeline"):
        Batcher(FluxInpaintPipeline.from_pipe(pipe))
    with pytest.raises(NotImplementedError, match="NoneType"):
        Batcher(object())
    with pytest.raises(NotImplementedError, match="callback_on_step_end must be None"):
        depart(pipe, arguments(0, callback_on_step_end=lambda *_: {}))


REFUSED: list[tuple[Callable[[Any], Any], str]] = [
    (lambda pipe: Batcher(pipe, config=afcache.policy("teacache")), "must know before a step"),
    (lambda pipe: Batcher(pipe, config=afcache.policy("layerwise")), "must know before a step"),
    (lambda pipe: depart(pipe, arguments(0, num_images_per_prompt=2)), "one image, got 2"),
]


@pytest.mark.parametrize(("action", "message"), REFUSED, ids=["gate", "groups", "two images"])
def test_what_cannot_share_a_call_is_refused(pipe, action: Callable[[Any], Any], message: str):
    with pytest.raises((NotImplementedError, ValueError), match=message):
        action(pipe)


def test_other_solvers_are_refused_by_name(pipe):
    flow: dict[str, Any] = {"use_flow_sigmas": True, "use_dynamic_shifting": True, "prediction_type": "flow_prediction"}
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **flow)
    with pytest.raises(NotImplementedError, match="DPMSolverMultistepScheduler takes others"):
        depart(pipe, arguments(0))


def test_departing_changes_no_pipeline(pipe):
    before = dict(vars(pipe)), dict(pipe.config), pipe.scheduler.config
    departure = depart(pipe, arguments(1))
    assert (dict(vars(pipe)), dict(pipe.config), pipe.scheduler.config) == before
    assert len(departure.branches) == 2
    assert len(departure.sigmas) == 15
    assert departure.guidance_scale == 2.0


def test_nobody_waits_for_ever(pipe):
    """One at a time, and always two of a better rank: the other is computed after `patience` ticks and theirs."""
    config = afcache.PRESETS["balanced"]
    engine = Engine(pipe.transformer, config=config, max_batch=1, patience=3)
    departure = depart(pipe, arguments(0))
    engine.admit(0, departure, config, rank=1.0)
    waited, longest, count = 0, 0, 0
    while (before := engine.progress(0)).steps:
        while len(engine) < 3:
            count += 1
            engine.admit(count, departure, config, rank=0.0)
        engine.tick()
        waited = waited + 1 if engine.progress(0) == before else 0
        longest = max(longest, waited)
        assert engine.ticks < 100, "it was never served"
    assert 1 <= longest <= 3 + 2
    assert count > 2
