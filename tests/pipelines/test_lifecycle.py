"""What people do to a pipeline before and after compile_pipeline: offload, LoRA, copies, saving, sharing."""

import copy
import gc
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline

import afcache
from afcache import CacheConfig
from tests.support.sampling import PROMPT, compiled, largest_difference, make_lora, sample

pytestmark = pytest.mark.host


def assert_ours(pipe, steps: int = 12) -> None:
    """The last image went through our forward from the first step to the last."""
    report = afcache.report(pipe)
    assert [step.step for step in report.steps] == list(range(steps))
    assert "." in report.pattern()


def test_compiling_twice_replaces_the_settings(own):
    expected = sample(own, steps=12)
    forward = own.transformer.forward
    compiled(own)
    sample(own, steps=12)
    compiled(own, CacheConfig(tolerance=0.0))
    assert afcache.report(own).steps == ()
    assert largest_difference(sample(own, steps=12), expected) < 1e-4
    assert afcache.report(own).pattern() == "F" * 12
    afcache.restore_pipeline(own)
    assert own.transformer.forward == forward
    assert np.array_equal(sample(own, steps=12), expected)


def test_report_before_a_run_is_empty(own):
    compiled(own)
    report = afcache.report(own)
    assert report.steps == ()
    assert report.block_speedup == 1.0
    assert "nothing has run yet" in str(report)


@pytest.mark.parametrize("when", ["before", "after"])
def test_model_offload_keeps_every_step_ours(own, when: str):
    plain = [sample(own, seed, steps=12) for seed in range(3)]
    expected = [sample(compiled(own), seed, steps=12) for seed in range(3)]
    afcache.restore_pipeline(own)
    if when == "before":
        own.enable_model_cpu_offload(device="cpu")
        compiled(own)
    else:
        compiled(own)
        own.enable_model_cpu_offload(device="cpu")
    for seed in range(3):
        assert np.array_equal(sample(own, seed, steps=12), expected[seed])
        assert_ours(own)
    afcache.restore_pipeline(own)
    for seed in range(3):
        assert np.array_equal(sample(own, seed, steps=12), plain[seed])
    own.remove_all_hooks()
    assert np.array_equal(sample(own, 0, steps=12), plain[0])


def test_save_and_reload_write_the_same_pipeline(own, tmp_path):
    expected = sample(own, steps=12)
    own.save_pretrained(tmp_path / "before")
    compiled(own)
    sample(own, steps=12)
    own.save_pretrained(tmp_path / "after")
    files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*.*")) for n in ("before", "after")]
    assert files[0] == files[1]
    for name in files[0]:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    reloaded = FluxPipeline.from_pretrained(tmp_path / "after")
    reloaded.set_progress_bar_config(disable=True)
    assert np.array_equal(sample(reloaded, steps=12), expected)


def test_lora_loads_scales_fuses_and_unloads_after_compiling(own, tmp_path):
    make_lora(tmp_path)
    plain = sample(own, steps=12)
    own.load_lora_weights(tmp_path)
    with_lora = sample(own, steps=12)
    scaled = sample(own, steps=12, joint_attention_kwargs={"scale": 0.5})
    own.unload_lora_weights()
    assert afcache.psnr(with_lora, plain) < 40

    compiled(own, CacheConfig(tolerance=0.0))
    own.load_lora_weights(tmp_path)
    assert largest_difference(sample(own, steps=12), with_lora) < 1e-4
    assert largest_difference(sample(own, steps=12, joint_attention_kwargs={"scale": 0.5}), scaled) < 1e-4
    own.fuse_lora()
    assert largest_difference(sample(own, steps=12), with_lora) < 1e-4
    own.unfuse_lora()
    own.unload_lora_weights()
    assert largest_difference(sample(own, steps=12), plain) < 1e-4
    own.load_lora_weights(tmp_path)
    afcache.restore_pipeline(own)
    assert largest_difference(sample(own, steps=12), with_lora) < 1e-4
    own.unload_lora_weights()
    assert largest_difference(sample(own, steps=12), plain) < 1e-4


def test_lora_under_compilation_gives_no_stale_image(short, tmp_path):
    make_lora(tmp_path, short)
    plain = sample(short, steps=4)
    short.load_lora_weights(tmp_path, adapter_name="test")
    with_lora = sample(short, steps=4)
    short.set_adapters("test", 0.5)
    with_half = sample(short, steps=4)
    assert largest_difference(with_half, with_lora) > 0.01
    short.unload_lora_weights()
    afcache.compile_pipeline(short, CacheConfig(tolerance=0.0), backend="eager")
    assert largest_difference(sample(short, steps=4), plain) < 1e-4
    short.load_lora_weights(tmp_path, adapter_name="test")
    assert largest_difference(sample(short, steps=4), with_lora) < 1e-4
    short.set_adapters("test", 0.5)
    assert largest_difference(sample(short, steps=4), with_half) < 1e-4
    short.unload_lora_weights()
    assert largest_difference(sample(short, steps=4), plain) < 1e-4


def test_deepcopy_runs_on_its_own(own):
    expected = sample(compiled(own), steps=12)
    twin = copy.deepcopy(own)
    assert twin.transformer._afcache is not own.transformer._afcache
    assert twin.transformer.forward.__self__ is twin.transformer
    with torch.no_grad():
        twin.transformer.proj_out.weight.mul_(0.5)
    assert not np.array_equal(sample(twin, steps=12), expected)
    assert_ours(twin)
    assert np.array_equal(sample(own, steps=12), expected)
    afcache.restore_pipeline(twin)
    assert np.array_equal(sample(own, steps=12), expected)
    assert_ours(own)


def test_deepcopy_of_the_transformer_alone_has_the_hosts_forward_semantics(own):
    compiled(own)
    expected = sample(own, steps=12)
    pipe = FluxPipeline(**{**own.components, "transformer": copy.deepcopy(own.transformer)})
    pipe.set_progress_bar_config(disable=True)
    assert np.array_equal(sample(pipe, steps=12), expected)


def test_components_build_a_pipeline_that_is_cached_too(own):
    expected = sample(compiled(own), steps=12)
    other = FluxPipeline(**own.components)
    other.set_progress_bar_config(disable=True)
    assert np.array_equal(sample(other, steps=12), expected)
    assert_ours(other)


def test_to_moves_and_casts_as_before(own):
    compiled(own)
    own.to(torch.bfloat16)
    assert own.transformer.dtype == torch.bfloat16
    image = sample(own, steps=12)
    assert_ours(own)
    own.to("cpu", torch.float32)
    afcache.restore_pipeline(own)
    assert afcache.psnr(image, sample(own, steps=12)) > 20


def img2img(pipe, image: np.ndarray, strength: float = 0.6) -> np.ndarray:
    return pipe(
        PROMPT,
        image=torch.from_numpy(image).permute(0, 3, 1, 2),
        strength=strength,
        height=32,
        width=32,
        max_sequence_length=16,
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).images


def test_from_pipe_shares_the_cache_and_starts_late_in_the_schedule(own):
    start = sample(own, steps=12)
    plain = FluxImg2ImgPipeline.from_pipe(own)
    plain.set_progress_bar_config(disable=True)
    expected = img2img(plain, start)
    compiled(own)
    shared = FluxImg2ImgPipeline.from_pipe(own)
    shared.set_progress_bar_config(disable=True)
    image = img2img(shared, start)
    report = afcache.report(shared)
    assert [step.step for step in report.steps] == list(range(8, 20))
    assert report.pattern().startswith("FF")
    assert "." in report.pattern()
    assert 25 < afcache.psnr(image, expected) < 100
    compiled(own, CacheConfig(tolerance=0.0))
    assert largest_difference(img2img(shared, start), expected) < 1e-4
    afcache.restore_pipeline(shared)
    assert np.array_equal(img2img(plain, start), expected)


def test_from_pipe_with_a_scheduler_of_its_own_must_be_compiled_too(own):
    compiled(own)
    expected = sample(own, steps=12)
    other = FluxPipeline.from_pipe(own)
    other.set_progress_bar_config(disable=True)
    other.scheduler = FlowMatchEulerDiscreteScheduler.from_config(own.scheduler.config, use_dynamic_shifting=False, shift=2.0)
    with pytest.raises(RuntimeError, match=r"call afcache\.compile_pipeline on that pipeline too"):
        sample(other, steps=12)
    compiled(other)
    shifted = sample(other, steps=12)
    assert_ours(other)
    assert np.array_equal(sample(own, steps=12), expected)
    assert np.array_equal(sample(other, steps=12), shifted)
    afcache.restore_pipeline(own)
    assert afcache.psnr(shifted, sample(other, steps=12)) > 25


def test_uncached_runs_the_hosts_forward_inside_the_block_only(own):
    plain = sample(own, steps=12)
    cached = sample(compiled(own), steps=12)
    with afcache.uncached(own):
        assert np.array_equal(sample(own, steps=12), plain)
    assert np.array_equal(sample(own, steps=12), cached)
    with pytest.raises(KeyError, match="inside"), afcache.uncached(own):
        raise KeyError("inside")
    assert np.array_equal(sample(own, steps=12), cached)


def test_compiling_inside_uncached_stays(own):
    compiled(own)
    with afcache.uncached(own):
        compiled(own, CacheConfig(tolerance=0.5))
    assert afcache.report(own).config["tolerance"] == 0.5


def test_a_pipeline_made_by_from_pipe_outlives_its_parent(own):
    start = sample(own, steps=12)
    compiled(own)
    child = FluxImg2ImgPipeline.from_pipe(own)
    child.set_progress_bar_config(disable=True)
    expected = img2img(child, start)
    scheduler, transformer = own.scheduler, own.transformer
    parent = FluxPipeline(**own.components)
    afcache.restore_pipeline(own)
    compiled(parent)
    del parent
    gc.collect()
    assert transformer._afcache.pipelines.alive() == []
    assert child.scheduler is scheduler
    assert np.array_equal(img2img(child, start), expected)


def test_an_aborted_pipeline_does_not_block_another_that_shares_the_transformer(own):
    other = FluxPipeline.from_pipe(own)
    other.set_progress_bar_config(disable=True)
    other.scheduler = FlowMatchEulerDiscreteScheduler.from_config(own.scheduler.config)
    compiled(own)
    compiled(other)
    handle = own.transformer.register_forward_pre_hook(fail_at_the_second_call())
    with pytest.raises(KeyError, match="second call"):
        sample(own, steps=6, cfg=2.0)
    handle.remove()
    assert sample(other, steps=6, height=48, width=48).shape == (1, 48, 48, 3)


def fail_at_the_second_call() -> Any:
    calls = []

    def hook(_module: Any, _arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("second call")

    return hook


def test_restoring_puts_back_the_bound_method_that_was_there(own):
    own.enable_model_cpu_offload(device="cpu")
    own.remove_all_hooks()
    left_by_accelerate = own.transformer.__dict__["forward"]
    compiled(own)
    afcache.restore_pipeline(own)
    assert own.transformer.__dict__["forward"] is left_by_accelerate


def test_a_wrapper_that_outlives_restoring_falls_back_to_the_hosts_forward(own):
    expected = sample(own, steps=4)
    compiled(own)
    wrapped = own.transformer.forward
    own.transformer.forward = lambda *arguments, **options: wrapped(*arguments, **options)
    afcache.restore_pipeline(own)
    assert np.array_equal(sample(own, steps=4), expected)
