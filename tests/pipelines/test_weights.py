"""Weights as people have them: adapters, fused, quantised, cast and offloaded, before compile_pipeline and after it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, TorchAoConfig
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

import afcache
from afcache import CacheConfig
from tests.support.mini_flux import fresh_mini_flux
from tests.support.sampling import ADAPTIVE, compiled, largest_difference, make_lora, sample, shorten

pytestmark = pytest.mark.host
CPU = torch.device("cpu")
# torchao would otherwise change inductor's settings for the whole process.
INT8_WEIGHTS = Int8WeightOnlyConfig(set_inductor_config=False)
INT8_BOTH = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def cast(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def offload_leaves(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(onload_device=CPU, offload_type="leaf_level")


def load_lora(pipe: Any, folder: Any, name: str = "first") -> None:
    make_lora(folder)
    pipe.load_lora_weights(folder, adapter_name=name)


def quantise_blocks(pipe: Any, settings: Any) -> None:
    """Linear layers of the blocks alone: the others are too small for integers' kernels."""
    quantize_(
        pipe.transformer, settings, filter_fn=lambda module, name: "blocks" in name and isinstance(module, torch.nn.Linear)
    )


WEIGHTS: dict[str, Callable[[Any, Any], None]] = {
    "lora": load_lora,
    "fused qkv": lambda pipe, _: pipe.transformer.fuse_qkv_projections(),
    "int8 weights": lambda pipe, _: quantize_(pipe.transformer, INT8_WEIGHTS),
    "layerwise casting": lambda pipe, _: cast(pipe),
    "model offload": lambda pipe, _: pipe.enable_model_cpu_offload(device="cpu"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(short, tmp_path, name: str):
    """Tolerance 0 is the uncached image; mixed decisions are one graph, also over several images, and eager's."""
    WEIGHTS[name](short, tmp_path)
    expected = sample(short, steps=12)
    assert largest_difference(sample(compiled(short, CacheConfig(tolerance=0.0)), steps=12), expected) < 1e-4
    eager = sample(compiled(short), steps=12, output_type="latent")
    pattern = afcache.report(short).pattern()
    assert set(pattern) == {"F", "."}
    afcache.compile_pipeline(short, ADAPTIVE, backend="aot_eager")
    for _ in range(2):
        assert largest_difference(sample(short, steps=12, output_type="latent"), eager) < 1e-4
        assert afcache.report(short).pattern() == pattern
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    afcache.restore_pipeline(short)
    assert np.array_equal(sample(short, steps=12), expected)


@pytest.mark.parametrize("name", ["fused qkv", "int8 weights", "layerwise casting"])
def test_weights_changed_after_compiling(short, tmp_path, name: str):
    """Nothing stale: one graph more, and what the uncached pipeline draws of the new weights."""
    exact = afcache.compile_pipeline(short, CacheConfig(tolerance=0.0), backend="aot_eager")
    before = sample(exact, steps=6)
    WEIGHTS[name](short, tmp_path)
    changed = sample(exact, steps=6)
    with afcache.uncached(short):
        assert largest_difference(changed, sample(short, steps=6)) < 1e-4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert name == "fused qkv" or largest_difference(changed, before) > 1e-4


def test_weights_and_activations_in_int8(short):
    """Differences in the last bit make activations round the other way, so images agree as far as that goes."""
    quantise_blocks(short, INT8_BOTH)
    expected = sample(short, steps=12)
    assert largest_difference(sample(compiled(short, CacheConfig(tolerance=0.0)), steps=12), expected) < 0.02
    afcache.compile_pipeline(short, ADAPTIVE, backend="aot_eager")
    assert afcache.psnr(sample(short, steps=12), expected) > 30
    assert set(afcache.report(short).pattern()) == {"F", "."}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


# Of adapters, the code that inductor writes is that of ordinary layers.
@pytest.mark.compile
@pytest.mark.parametrize("name", [pytest.param("lora", marks=pytest.mark.contract), "int8 weights"])
def test_weights_with_inductor(short, tmp_path, name: str):
    WEIGHTS[name](short, tmp_path)
    expected = sample(compiled(short), steps=12, output_type="latent")
    afcache.compile_pipeline(short, ADAPTIVE)
    assert largest_difference(sample(short, steps=12, output_type="latent"), expected) < 2e-3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_transformer_that_diffusers_quantised_at_loading_is_cached(pipe):
    transformer: Any = FluxTransformer2DModel.from_pretrained(
        afcache.mini_flux_folder(),
        subfolder="transformer",
        torch_dtype=torch.float32,
        quantization_config=TorchAoConfig(INT8_WEIGHTS),
    )
    quantised = shorten(FluxPipeline(**{**pipe.components, "transformer": transformer}))
    quantised.set_progress_bar_config(disable=True)
    expected = sample(quantised, steps=12)
    assert largest_difference(sample(compiled(quantised, CacheConfig(tolerance=0.0)), steps=12), expected) < 1e-4
    eager = sample(compiled(quantised), steps=12, output_type="latent")
    afcache.compile_pipeline(quantised, ADAPTIVE, backend="aot_eager")
    assert largest_difference(sample(quantised, steps=12, output_type="latent"), eager) < 1e-4
    assert set(afcache.report(quantised).pattern()) == {"F", "."}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_leaf_level_group_offload_works_eagerly(own, when: str):
    expected = sample(own, steps=12)
    cached = sample(compiled(own), steps=12)
    afcache.restore_pipeline(own)
    for config, image in ((CacheConfig(tolerance=0.0), expected), (ADAPTIVE, cached)):
        if when == "before" and config is not ADAPTIVE:
            offload_leaves(own)
        compiled(own, config)
        if when == "after" and config is not ADAPTIVE:
            offload_leaves(own)
        assert largest_difference(sample(own, steps=12), image) < 1e-4
    assert set(afcache.report(own).pattern()) == {"F", "."}


@pytest.mark.parametrize("when", ["before", "after"])
def test_leaf_level_group_offload_is_refused_by_compilation(own, when: str):
    words = r"linear_1 has hooks \['group_offloading'\], which act in the middle of the forward .* Pass compile=False"
    if when == "before":
        offload_leaves(own)
        with pytest.raises(NotImplementedError, match=words):
            afcache.compile_pipeline(own)
    else:
        afcache.compile_pipeline(own, backend="aot_eager")
        offload_leaves(own)
        with pytest.raises(NotImplementedError, match=words):
            sample(own, steps=2)


def test_casting_layers_with_adapters_is_refused_by_compilation(own, tmp_path):
    load_lora(own, tmp_path)
    cast(own)
    expected = sample(own, steps=4)
    assert largest_difference(sample(compiled(own, CacheConfig(tolerance=0.0)), steps=4), expected) < 1e-4
    with pytest.raises(NotImplementedError, match=r"to_q has hooks \['peft_autocast_disable'\]"):
        afcache.compile_pipeline(own)


def test_how_often_adapters_recompile(short, tmp_path):
    """A new kind of layers is one graph; scales, and what was seen before, are none. Never a stale image."""
    make_lora(tmp_path)
    twin = shorten(fresh_mini_flux())
    twin.set_progress_bar_config(disable=True)
    afcache.compile_pipeline(short, CacheConfig(tolerance=0.0), backend="eager")
    load = {"adapter_name": "first"}
    actions: list[tuple[str, int, Callable[[Any], Any], dict[str, Any]]] = [
        ("load", 1, lambda pipe: pipe.load_lora_weights(tmp_path, **load), {}),
        ("rescale", 0, lambda pipe: pipe.set_adapters("first", 0.3), {}),
        ("rescale", 0, lambda pipe: pipe.set_adapters("first", 0.7), {}),
        ("scale", 0, lambda pipe: None, {"joint_attention_kwargs": {"scale": 0.3}}),
        ("fuse", 1, lambda pipe: pipe.fuse_lora(), {}),
        ("unfuse", 0, lambda pipe: pipe.unfuse_lora(), {}),
        ("unload", 1, lambda pipe: pipe.unload_lora_weights(), {}),
        ("load again", 0, lambda pipe: pipe.load_lora_weights(tmp_path, **load), {}),
        ("unload again", 0, lambda pipe: pipe.unload_lora_weights(), {}),
    ]
    images, graphs = [sample(twin, steps=3)], 0
    for name, new, act, options in actions:
        for pipe in (short, twin):
            act(pipe)
        images.append(sample(twin, steps=3, **options))
        assert largest_difference(sample(short, steps=3, **options), images[-1]) < 1e-4, name
        graphs += new
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, name
    assert largest_difference(images[1], images[0]) > 0.01
    assert largest_difference(images[2], images[3]) > 0.01


def test_hot_swapped_adapters_are_not_stale_and_share_a_graph(own, tmp_path):
    """Prepared for it, scales are tensors of the host's own."""
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        make_lora(tmp_path / name)
    own.enable_lora_hotswap(target_rank=8)
    own.load_lora_weights(tmp_path / "first", adapter_name="one")
    expected = []
    for name in ("first", "second"):
        own.load_lora_weights(tmp_path / name, adapter_name="one", hotswap=True)
        expected.append(sample(own, steps=6))
    assert largest_difference(*expected) > 0.01
    choices: list[dict[str, Any]] = [{"compile": False}, {"backend": "aot_eager"}]
    for options in choices:
        afcache.compile_pipeline(own, CacheConfig(tolerance=0.0), **options)
        for name, image in zip(("first", "second", "first"), [*expected, expected[0]], strict=True):
            own.load_lora_weights(tmp_path / name, adapter_name="one", hotswap=True)
            assert largest_difference(sample(own, steps=6), image) < 1e-4
            assert largest_difference(sample(own, steps=6, joint_attention_kwargs={"scale": 0.5}), image) > 1e-3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("options", [{"compile": False}, {"backend": "aot_eager"}], ids=["eager", "compiled"])
def test_adapters_rescaled_within_an_image_start_the_cache_again(short, tmp_path, options: dict[str, Any]):
    """What the other model left in the history is no forecast of this one."""
    load_lora(short, tmp_path)

    def rescale(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step in (0, 9):
            pipe.set_adapters("first", 1.0 if step == 0 else 0.1)
        return tensors

    expected = sample(short, callback_on_step_end=rescale)
    afcache.compile_pipeline(short, ADAPTIVE, **options)
    image = sample(short, callback_on_step_end=rescale)
    pattern = afcache.report(short).pattern()
    assert pattern[10:12] == "FF"
    assert "." in pattern[3:10]
    assert "." in pattern[12:]
    assert afcache.psnr(image, expected) > 30
    # A compiled step is shown tensors in place of the host's numbers, which must be there again.
    scales = [scale for module in short.transformer.modules() for scale in getattr(module, "scaling", {}).values()]
    assert scales
    assert all(isinstance(scale, float) for scale in scales)
    if options.get("compile", True):
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_noise_of_quantised_activations_is_measured_and_of_weights_alone_is_none(own):
    quantise_blocks(own, INT8_BOTH)
    sample(compiled(own), steps=4)
    measured = own.transformer._afcache.last_trajectory(own).schedule[0].noise_floor
    assert float(measured) == pytest.approx(afcache.measure_noise(own))
    # Two evaluations at neighbouring inputs, against the exact model, differ by 0.0035 times the root of 2 on this model.
    assert 0.004 < float(measured) < 0.006
    other = fresh_mini_flux()
    quantize_(other.transformer, INT8_WEIGHTS)
    assert afcache.measure_noise(other) < 1e-5


def test_the_noise_floor_of_the_settings_counts_and_unquantised_weights_have_none(own):
    sample(compiled(own, ADAPTIVE), steps=2)
    assert float(own.transformer._afcache.last_trajectory(own).schedule[0].noise_floor) == 0
    sample(compiled(own, CacheConfig(noise_floor=0.25)), steps=2)
    assert float(own.transformer._afcache.last_trajectory(own).schedule[0].noise_floor) == 0.25
    quantise_blocks(own, INT8_BOTH)
    sample(own, steps=2)
    assert float(own.transformer._afcache.last_trajectory(own).schedule[0].noise_floor) == 0.25
