"""Schedulers and arguments: what is supported works, what is not is refused with the way out."""

import dataclasses
import pickle
from logging import Handler, LogRecord
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import logging

import afcache
from afcache import CacheConfig
from tests.support.sampling import ADAPTIVE, compiled, sample

pytestmark = pytest.mark.host


def multistep_scheduler(**settings: Any) -> DPMSolverMultistepScheduler:
    flow: dict[str, Any] = {"use_flow_sigmas": True, "use_dynamic_shifting": True, "prediction_type": "flow_prediction"}
    return DPMSolverMultistepScheduler(**flow, **settings)


def warnings_of(action) -> list[str]:
    """What afcache's logger warns of while `action` runs."""
    messages: list[str] = []

    class Collect(Handler):
        def emit(self, record: LogRecord) -> None:
            messages.append(record.getMessage())

    logger = logging.get_logger("afcache")
    handler = Collect()
    logger.addHandler(handler)
    try:
        action()
    finally:
        logger.removeHandler(handler)
    return messages


def test_the_correction_is_off_with_one_warning_where_it_does_not_hold(pipe):
    # Clipped to a quantile of its own, a sample is no linear function of outputs any more.
    pipe.scheduler = multistep_scheduler(thresholding=True, solver_order=1)
    compiled(pipe)
    messages = warnings_of(lambda: [sample(pipe, seed) for seed in range(2)])
    assert len(messages) == 1
    assert "The catch-up correction is off: DPMSolverMultistepScheduler is not linear" in messages[0]
    assert afcache.report(pipe).correction == "off"
    assert set(afcache.report(pipe).pattern()) == {"F", "."}
    compiled(pipe, dataclasses.replace(ADAPTIVE, correction=False))
    assert warnings_of(lambda: sample(pipe)) == []


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_a_multistep_scheduler_stays_close_to_its_own_uncached_image(pipe, kind: type):
    pipe.scheduler = kind(use_flow_sigmas=True, use_dynamic_shifting=True, prediction_type="flow_prediction")
    expected = sample(pipe)
    compiled(pipe, dataclasses.replace(ADAPTIVE, correction=False))
    assert afcache.psnr(sample(pipe), expected) > 25


def test_ratios_of_another_model_are_warned_of(pipe):
    own = afcache.policy("magcache", magnitude_ratios=(1.0, 0.9, 0.8))
    assert warnings_of(lambda: afcache.compile_pipeline(pipe, own, compile=False)) == []
    (line,) = warnings_of(lambda: afcache.compile_pipeline(pipe, afcache.policy("magcache"), compile=False))
    assert "measured on FLUX.1-dev, 57 blocks; this transformer has 12. Measure its own" in line


def test_a_scheduler_that_replaced_its_step_is_refused(pipe):
    class Noisy(FlowMatchEulerDiscreteScheduler):
        def step(self, *arguments, **options):
            return super().step(*arguments, **options)

    pipe.scheduler = Noisy.from_config(pipe.scheduler.config)
    with pytest.raises(NotImplementedError, match="scheduler Noisy is not supported"):
        compiled(pipe)


@pytest.mark.parametrize("place", ["block", "attention"])
@pytest.mark.parametrize("kind", ["hook", "forward", "compile"])
def test_what_is_attached_to_a_block_is_refused_before_and_after_compiling(pipe, place: str, kind: str):
    block = pipe.transformer.single_transformer_blocks[2]
    module = block if place == "block" else block.attn
    compiled(pipe)
    if kind == "hook":
        handle = module.register_forward_hook(lambda *_: None)
        undo, words = handle.remove, "has forward hooks"
    elif kind == "forward":
        module.forward = lambda *arguments, **options: None
        undo, words = lambda: module.__dict__.pop("forward"), "has a forward of its own"
    else:
        module.compile(backend="eager")
        undo, words = lambda: setattr(module, "_compiled_call_impl", None), "has been compiled by itself"
    try:
        with pytest.raises(NotImplementedError, match=words):
            sample(pipe, steps=2)
        with pytest.raises(NotImplementedError, match=words):
            compiled(pipe)
    finally:
        undo()
    assert sample(pipe, steps=2).shape == (1, 32, 32, 3)


def test_an_attention_backend_set_after_the_first_image_is_used(pipe, monkeypatch):
    from afcache.models.flux1 import backend as flux1_backend

    calls = []
    original = flux1_backend.dispatch_attention_fn
    monkeypatch.setattr(flux1_backend, "dispatch_attention_fn", lambda *a, **k: calls.append(k["backend"]) or original(*a, **k))
    compiled(pipe)
    first = sample(pipe, steps=4)
    assert calls == []
    pipe.transformer.set_attention_backend("_native_math")
    second = sample(pipe, steps=4)
    pipe.transformer.reset_attention_backend()
    assert len(calls) >= 12
    assert afcache.psnr(first, second) > 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "nope"}, "backend must be a callable or one of .*inductor.*, got 'nope'"),
        ({"mode": "bananas"}, "mode must be one of None, 'default', .*, got 'bananas'"),
    ],
)
def test_compile_options_are_checked_at_once(pipe, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        afcache.compile_pipeline(pipe, **options)


@torch.no_grad()
def test_calls_without_scheduler_steps_are_refused(pipe):
    compiled(pipe)
    arguments = begin(pipe)
    for _ in range(8):
        pipe.transformer(**arguments)
    with pytest.raises(RuntimeError, match="transformer was called 9 times at step 0, more than guidance has branches"):
        pipe.transformer(**arguments)


def test_unknown_schedulers_are_refused(pipe):
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(NotImplementedError, match="scheduler FlowMatchHeunDiscreteScheduler is not supported"):
        compiled(pipe)


def test_a_scheduler_swapped_for_one_that_draws_noise_is_refused_at_the_call(pipe):
    compiled(pipe)
    pipe.scheduler = FlowMatchLCMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(NotImplementedError, match="scheduler FlowMatchLCMScheduler as configured draws new noise"):
        sample(pipe)


def test_repeated_sigmas_are_refused(pipe):
    compiled(pipe)
    with pytest.raises(ValueError, match=r"scheduler.sigmas repeats 0\.\d+ at steps 1 and 2"):
        sample(pipe, steps=4, sigmas=[1.0, 0.5, 0.5, 0.2])


def begin(pipe) -> dict:
    """Start a schedule by hand; return arguments for the transformer's first call."""
    pipe.scheduler.set_timesteps(10, mu=0.5)
    pipe.scheduler.set_begin_index(0)
    return transformer_inputs(pipe)


def transformer_inputs(pipe) -> dict:
    return {
        "hidden_states": torch.randn(1, 64, pipe.transformer.config.in_channels),
        "encoder_hidden_states": torch.randn(1, 16, 64),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.zeros(64, 3),
        "txt_ids": torch.zeros(16, 3),
    }


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"joint_attention_kwargs": {"ip_hidden_states": []}}, r"joint_attention_kwargs \['ip_hidden_states'\]"),
    ],
    ids=["ip-adapter"],
)
@torch.no_grad()
def test_unsupported_arguments_are_refused(pipe, extra: dict, message: str):
    compiled(pipe)
    with pytest.raises(NotImplementedError, match=message):
        pipe.transformer(**transformer_inputs(pipe), **extra)


def test_gradient_mode_is_refused(pipe):
    compiled(pipe)
    with pytest.raises(NotImplementedError, match="gradient mode is on"):
        pipe.transformer(**transformer_inputs(pipe))


@torch.no_grad()
def test_a_timestep_off_the_schedule_is_refused(pipe):
    compiled(pipe)
    pipe.scheduler.set_timesteps(10, mu=0.5)
    arguments = {**transformer_inputs(pipe), "timestep": torch.tensor([0.123])}
    pipe.scheduler.set_begin_index(0)
    with pytest.raises(RuntimeError, match="timestep 123 does not fit the present step"):
        pipe.transformer(**arguments)


@torch.no_grad()
def test_a_changed_shape_within_a_trajectory_is_another_one(pipe):
    compiled(pipe)
    arguments = begin(pipe)
    pipe.transformer(**arguments)
    pipe.scheduler.step(torch.zeros_like(arguments["hidden_states"]), pipe.scheduler.timesteps[0], arguments["hidden_states"])
    arguments.update(timestep=pipe.scheduler.timesteps[1:2] / 1000)
    pipe.transformer(**arguments)
    arguments.update(hidden_states=arguments["hidden_states"][:, :32], img_ids=torch.zeros(32, 3))
    found = pipe.transformer(**arguments).sample
    assert [(each.step, each.reason) for each in afcache.report(pipe).restarts] == [(1, "latents")]
    with afcache.uncached(pipe):
        torch.testing.assert_close(found, pipe.transformer(**arguments).sample, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_output_kinds_are_the_hosts(pipe):
    compiled(pipe)
    arguments = transformer_inputs(pipe)
    for return_dict in (True, False):
        begin(pipe)
        output = pipe.transformer(**arguments, return_dict=return_dict)
        value = output.sample if return_dict else output[0]
        assert value.shape == arguments["hidden_states"].shape


@pytest.mark.parametrize("options", [{"tolerance": 0.1}, {"preset": "fast"}, {"tolerance": 0.1, "preset": "fast"}])
def test_config_excludes_tolerance_and_preset(pipe, options: dict):
    with pytest.raises(ValueError, match="were both given, but config already holds every setting"):
        afcache.compile_pipeline(pipe, CacheConfig(), **options)


def test_other_pipelines_are_refused():
    with pytest.raises(NotImplementedError, match="pipe is a int; supported pipelines are FluxPipeline"):
        afcache.compile_pipeline(3)


def test_a_forward_of_the_users_own_is_refused(own):
    own.transformer.forward = lambda *_, **__: None
    with pytest.raises(NotImplementedError, match=r"transformer\.forward was replaced by"):
        compiled(own)


def test_pickling_is_refused_with_the_way_out(own):
    compiled(own)
    with pytest.raises(TypeError, match=r"cannot be pickled\. Use save_pretrained"):
        pickle.dumps(own.transformer)


def test_a_wrapped_transformer_is_refused(own):
    own.transformer = torch.compile(own.transformer, backend="eager")
    with pytest.raises(NotImplementedError, match="transformer is a OptimizedModule"):
        compiled(own)


def test_a_transformer_compiled_in_place_is_refused(own):
    own.transformer.compile(backend="eager")
    with pytest.raises(NotImplementedError, match=r"compiled in place by transformer\.compile\(\)"):
        compiled(own)


def test_another_cache_is_refused(own):
    from diffusers import FirstBlockCacheConfig

    own.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(NotImplementedError, match="already has a diffusers cache enabled"):
        compiled(own)


def test_block_level_group_offload_is_refused(own):
    device = torch.device("cpu")
    own.transformer.enable_group_offload(onload_device=device, offload_type="block_level", num_blocks_per_group=1)
    with pytest.raises(NotImplementedError, match=r"transformer_blocks\[0\] has diffusers hooks \['group_offloading'\]"):
        compiled(own)


@pytest.mark.parametrize("action", [afcache.restore_pipeline, afcache.report], ids=["restore", "report"])
def test_pipelines_that_were_not_compiled_are_refused(own, action):
    with pytest.raises(ValueError, match=r"pipe was not passed to afcache\.compile_pipeline"):
        action(own)
    compiled(own)
    afcache.restore_pipeline(own)
    with pytest.raises(ValueError, match=r"pipe was not passed to afcache\.compile_pipeline"):
        action(own)
