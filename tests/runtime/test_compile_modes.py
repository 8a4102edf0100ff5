"""torch.compile's modes on a small random FLUX: refused nowhere, and the state survives them."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import afcache
from afcache import CacheConfig
from afcache.runtime.compiled import CompileOptions
from afcache.runtime.steps import history_writer, write_newest
from bench.models.random_flux import draw_random, make_pipeline, make_transformer

pytestmark = pytest.mark.host
# Random weights change slowly with sigma, so the schedule decides: a mixed pattern that no rounding can turn.
CONFIG = CacheConfig(policy="fixed", interval=4, warmup_steps=2)


def run(device: str, mode: str | None, *, compile: bool = True) -> tuple[list[np.ndarray], str]:
    """Two images: the second would meet memory that the first one's graphs own."""
    pipe = make_pipeline(make_transformer(dim=128, double=1, single=1).to(device))
    afcache.compile_pipeline(pipe, CONFIG, compile=compile, mode=mode)
    return [draw_random(pipe, 16) for _ in range(2)], afcache.report(pipe).pattern()


def check(device: str, mode: str) -> None:
    expected, pattern = run(device, None, compile=False)
    results, compiled_pattern = run(device, mode)
    assert compiled_pattern == pattern == "FF" + "...F" * 6 + ".."
    for result, latents in zip(results, expected, strict=True):
        assert np.isfinite(result).all()
        torch.testing.assert_close(result, latents, rtol=0, atol=2e-3)


# What is ours of a mode is how it is passed on, and that nothing is kept in memory that the next call overwrites: tests below
# show both without inductor, which `test_everything_is_one_graph` asks.
@pytest.mark.compile
@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("reduce-overhead", marks=pytest.mark.slow),
        *(pytest.param(mode, marks=pytest.mark.contract) for mode in ("default", "max-autotune-no-cudagraphs")),
    ],
)
def test_modes_give_eagers_images(mode: str):
    check("cpu", mode)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.compile
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_states_survive_the_memory_of_cuda_graphs(mode: str):
    check("cuda", mode)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("policy", ["fixed", "none"])
def test_nothing_is_kept_in_memory_that_the_next_call_overwrites(monkeypatch, policy: str, guidance: float):
    """CUDA graphs on a machine without: a compiler whose graph returns the same buffers at every call."""

    def compile_to_static_buffers(function, **options):
        del options
        buffers: list[torch.Tensor | None] = []

        def graph(*args):
            leaves, structure = pytree.tree_flatten(function(*args))
            if not buffers:
                buffers.extend(None if leaf is None else torch.clone(leaf) for leaf in leaves)
            for buffer, leaf in zip(buffers, leaves, strict=True):
                if buffer is not None:
                    buffer.copy_(leaf)
            return pytree.tree_unflatten(buffers, structure)

        return graph

    config = dataclasses.replace(CONFIG, policy=policy)
    pipe = make_pipeline(make_transformer(dim=128, double=1, single=1))
    images = []
    monkeypatch.setattr(torch, "compile", compile_to_static_buffers)
    for compile in (False, True):
        afcache.compile_pipeline(pipe, config, compile=compile, mode="reduce-overhead")
        images.append(draw_random(pipe, 16, true_cfg_scale=guidance))
    assert np.array_equal(*images)


@pytest.mark.parametrize("dynamic", [True, False])
def test_dynamic_and_fixed_shapes_give_eagers_images(dynamic: bool):
    """With fixed shapes the history is written in place inside of the branch; with dynamic ones numbers stay constants."""
    pipe = make_pipeline(make_transformer(dim=128, double=1, single=1))
    images = []
    choices: list[dict[str, Any]] = [{"compile": False}, {"backend": "aot_eager", "dynamic": dynamic}]
    for options in choices:
        afcache.compile_pipeline(pipe, CONFIG, **options)
        images.append([draw_random(pipe, tokens, true_cfg_scale=2.0) for tokens in (16, 64, 16)])
    for eager, compiled in zip(*images, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if dynamic else 2)
    assert not torch._dynamo.config.specialize_float


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_states_in_cuda_graph_memory_or_of_any_shape_are_not_written_in_place(mode: str):
    assert history_writer(CompileOptions(mode=mode, dynamic=False)) is None
    assert history_writer(CompileOptions(backend="cudagraphs", dynamic=False)) is None
    assert history_writer(CompileOptions()) is None
    assert history_writer(CompileOptions(dynamic=False)) is history_writer(CompileOptions(enabled=False)) is write_newest


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_keep_what_they_mean_to_inductor(mode: str):
    tuning = CompileOptions(mode=mode).tuning()
    assert tuning["options"].items() >= torch._inductor.list_mode_options(mode).items() > set()
    assert tuning["options"]["size_asserts"] is False
    assert CompileOptions(mode="default").tuning() == CompileOptions().tuning() == {"options": {"size_asserts": False}}
    assert CompileOptions(mode=mode, backend="aot_eager").tuning() == {"mode": mode}
