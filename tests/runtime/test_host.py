"""compile="blocks": computed steps are the transformer's own forward, whatever was done to it; a cached step is small."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

import afcache
from tests.support.sampling import PROMPT, compiled, largest_difference, make_lora, sample

pytestmark = pytest.mark.host
NOISE = afcache.policy("noise")


def counters() -> Any:
    return torch._dynamo.utils.counters


def in_blocks(pipe: Any, **options: Any) -> Any:
    return afcache.compile_pipeline(pipe, NOISE, compile="blocks", **{"backend": "aot_eager", **options})


def assert_as_eager(pipe: Any, **options: Any) -> None:
    """The image and the decisions of the eager step, by `compile="blocks"`."""
    expected = sample(compiled(copy.deepcopy(pipe), NOISE), **options)
    image = sample(in_blocks(pipe), **options)
    assert {"F", "."} <= set(afcache.report(pipe).pattern())
    assert largest_difference(image, expected) < 1e-4


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_blocks_draw_what_the_eager_step_does(short, cfg: float):
    assert_as_eager(short, cfg=cfg)
    # Each kind of block, what follows a refresh, and the cached step.
    assert counters()["stats"]["unique_graphs"] == 4
    assert not counters()["graph_break"]
    sample(short, 5, cfg=cfg)
    assert counters()["stats"]["unique_graphs"] == 4


def test_nothing_is_computed_at_a_cached_step(short):
    calls = []
    handle = short.transformer.x_embedder.register_forward_pre_hook(lambda *_: calls.append(1))
    sample(in_blocks(short))
    handle.remove()
    assert len(calls) == afcache.report(short).pattern().count("F") < 20


def compile_whole(pipe: Any) -> None:
    pipe.transformer.compile(backend="aot_eager", fullgraph=True)


def compile_repeated_blocks(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(backend="aot_eager")


def replace_forward(pipe: Any) -> None:
    pipe.transformer.forward = torch.compile(pipe.transformer.forward, backend="aot_eager")


def offload_leaves(pipe: Any) -> None:
    apply_group_offloading(pipe.transformer, onload_device=torch.device("cpu"), offload_type="leaf_level")


def offload_blocks(pipe: Any) -> None:
    arguments: dict[str, Any] = {"offload_type": "block_level", "num_blocks_per_group": 1}
    apply_group_offloading(pipe.transformer, onload_device=torch.device("cpu"), **arguments)


def take_own_attention(pipe: Any) -> None:
    class Foreign:
        """Of a class that is not diffusers'."""

        def __init__(self) -> None:
            self._inside = FluxAttnProcessor()

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self._inside(*args, **kwargs)

    pipe.transformer.set_attn_processor(Foreign())


@pytest.mark.parametrize(
    "prepare",
    [compile_whole, compile_repeated_blocks, replace_forward, offload_leaves, offload_blocks, take_own_attention],
    ids=lambda prepare: prepare.__name__,
)
def test_what_was_done_to_the_model_stays(short, prepare: Any):
    """What a step of one graph refuses, or would bypass."""
    expected = sample(compiled(copy.deepcopy(short), NOISE))
    plain = sample(short, 7)
    prepare(short)
    image = sample(in_blocks(short))
    assert {"F", "."} <= set(afcache.report(short).pattern())
    assert largest_difference(image, expected) < 1e-4
    afcache.restore_pipeline(short)
    assert largest_difference(sample(short, 7), plain) < 1e-4


@pytest.mark.parametrize("prepare", [compile_whole, compile_repeated_blocks, replace_forward, take_own_attention])
def test_a_step_of_one_graph_refuses_it_and_names_the_way_out(short, prepare: Any):
    prepare(short)
    with pytest.raises(NotImplementedError, match="compile='blocks'"):
        afcache.compile_pipeline(short, NOISE, compile=False)


def test_what_we_compiled_is_given_back(short):
    in_blocks(short)
    sample(short, steps=4)
    assert any(module._compiled_call_impl is not None for module in short.transformer.modules())
    afcache.restore_pipeline(short)
    assert all(module._compiled_call_impl is None for module in short.transformer.modules())


def test_what_the_user_compiled_is_not_taken_away(short):
    compile_whole(short)
    call = short.transformer._compiled_call_impl
    in_blocks(short)
    assert short.transformer._compiled_call_impl is None
    in_blocks(short)
    with pytest.raises(NotImplementedError, match="compiled in place"):
        afcache.compile_pipeline(short, NOISE)
    sample(short, steps=5)
    afcache.restore_pipeline(short)
    assert short.transformer._compiled_call_impl is call


def test_blocks_take_over_from_a_step_and_give_back(short):
    expected = sample(compiled(short, NOISE))
    for again in (in_blocks, lambda pipe: compiled(pipe, NOISE)):
        assert largest_difference(sample(again(short)), expected) < 1e-4
    assert all(module._compiled_call_impl is None for module in short.transformer.modules())


def test_casting_and_lora_run_inside_the_hosts_forward(own, tmp_path):
    make_lora(tmp_path)
    own.load_lora_weights(tmp_path)
    apply_layerwise_casting(own.transformer, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    plain = sample(own, joint_attention_kwargs={"scale": 0.5})
    image = sample(in_blocks(own), joint_attention_kwargs={"scale": 0.5})
    assert {"F", "."} <= set(afcache.report(own).pattern())
    assert float(np.square(image - plain).mean()) < 1e-3
    exact = afcache.compile_pipeline(own, dataclasses.replace(NOISE, tolerance=0.0), compile="blocks", backend="aot_eager")
    assert largest_difference(sample(exact, joint_attention_kwargs={"scale": 0.5}), plain) < 1e-4


def test_the_uncached_forward_is_the_hosts(short):
    replace_forward(short)
    expected = sample(short)
    in_blocks(short)
    with afcache.uncached(short):
        assert np.array_equal(sample(short), expected)


def test_a_copy_has_a_host_of_its_own(short):
    in_blocks(short)
    expected = sample(short)
    twin = copy.deepcopy(short)
    assert np.array_equal(sample(twin), expected)
    assert twin.transformer._afcache.host is not short.transformer._afcache.host


def test_batches_and_shapes_go_on(short):
    in_blocks(short)
    shapes: list[dict[str, Any]] = [{"seed": [0, 1], "prompt": [PROMPT] * 2}, {"height": 48, "width": 48}]
    for options in shapes:
        expected = sample(compiled(copy.deepcopy(short), NOISE), **options)
        assert largest_difference(sample(in_blocks(short), **options), expected) < 1e-4


def test_residuals_need_our_forward(pipe):
    with pytest.raises(ValueError, match=r"compile='blocks' needs a config whose target is 'noise' or 'velocity', got 'resid"):
        afcache.compile_pipeline(pipe, afcache.policy("residual"), compile="blocks")


def test_ranks_share_out_our_forward_alone(pipe):
    with pytest.raises(NotImplementedError, match="compile='blocks' cannot be combined with parallel"):
        afcache.compile_pipeline(pipe, NOISE, compile="blocks", parallel=afcache.ParallelConfig(ulysses_degree=2))


def test_a_cache_of_diffusers_is_refused(own):
    from diffusers import FirstBlockCacheConfig

    own.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(NotImplementedError, match="diffusers cache enabled"):
        in_blocks(own)


@pytest.mark.parametrize("wrong", ["whole", "no", 1, None])
def test_other_ways_to_compile_are_refused(pipe, wrong: Any):
    with pytest.raises(ValueError, match="compile must be True, False, 'step' or 'blocks', got"):
        afcache.compile_pipeline(pipe, compile=wrong)


def test_every_step_is_the_hosts_under_policy_none(short):
    """Also with what our forward would bypass."""

    def double(module: Any, inputs: Any, output: Any) -> Any:
        del module, inputs
        return output[0], 2 * output[1]

    handle = short.transformer.transformer_blocks[0].register_forward_hook(double)
    expected = sample(short)
    config = afcache.policy("none", target="noise")
    image = sample(afcache.compile_pipeline(short, config, compile="blocks", backend="aot_eager"))
    handle.remove()
    assert largest_difference(image, expected) < 1e-4


def test_hooks_of_the_transformer_run_once(short):
    compile_whole(short)
    calls = []
    handles = [
        short.transformer.register_forward_hook(lambda *_: calls.append("after")),
        short.transformer.register_forward_pre_hook(lambda *_: calls.append("before")),
    ]
    sample(in_blocks(short), steps=6)
    for handle in handles:
        handle.remove()
    assert calls == ["before", "after"] * 6


def test_compiling_afterwards_is_refused_and_not_undone(short):
    in_blocks(short)
    sample(short, steps=4)
    short.transformer.compile(backend="aot_eager")
    call = short.transformer._compiled_call_impl
    with pytest.raises(NotImplementedError, match=r"after compile_pipeline.* Compile it first"):
        sample(short, steps=4)
    afcache.restore_pipeline(short)
    assert short.transformer._compiled_call_impl is call


def test_clones_of_the_same_prompt_are_no_switch(short):
    """Where the call leaves open whether it was steered otherwise, the host looks."""

    def clone(pipe: Any, step: int, _timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        del pipe, step
        return {**arguments, "prompt_embeds": arguments["prompt_embeds"].clone()}

    options: dict[str, Any] = {
        "callback_on_step_end": clone,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    sample(in_blocks(short))
    pattern = afcache.report(short).pattern()
    sample(short, **options)
    assert afcache.report(short).pattern() == pattern
