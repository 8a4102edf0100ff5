"""Adapters, quantised, cast and offloaded weights under families whose models run their own forward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.utils import _pytree as pytree
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import afcache
from tests.support.one_graph import counters
from tests.support.zoo.everything import CACHED, MIXED, STEPS, difference, named, options_of
from tests.support.zoo.kind import Kind, draw

pytestmark = pytest.mark.host
CPU = torch.device("cpu")
NAMES = ("QwenImagePipeline", "Flux2KleinPipeline", "WanPipeline", "StableDiffusion3Pipeline")
FOUR = [kind for kind in CACHED if kind.name in NAMES]
SCALED = {"StableDiffusion3Pipeline": "joint_attention_kwargs"}


def add_lora(pipe: Any, name: str = "first") -> None:
    torch.manual_seed(len(name))
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name=name)


def cast(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def quantise(pipe: Any) -> None:
    quantize_(pipe.transformer, Int8WeightOnlyConfig(set_inductor_config=False))


def lower(arguments: dict[str, Any]) -> dict[str, Any]:
    """Embeddings as a text encoder in bfloat16 makes them."""

    def lowered(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor

    return pytree.tree_map_only(torch.Tensor, lowered, arguments)


WEIGHTS: dict[str, Callable[[Any], Any]] = {
    "lora": add_lora,
    "int8 weights": quantise,
    "layerwise casting": cast,
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "leaf-level group offload": lambda pipe: pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_type="leaf_level"
    ),
}


@named(FOUR)
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(kind: Kind, name: str):
    """Exact at tolerance 0, and saved steps then; what runs the model's own forward draws the same."""
    pipe, options = kind.make(), options_of(kind)
    plain = draw(pipe, kind, steps=STEPS, **options)
    WEIGHTS[name](pipe)
    expected = draw(pipe, kind, steps=STEPS, **options)
    assert name not in ("lora", "int8 weights", "layerwise casting") or difference(expected, plain) > 0
    ways: list[Any] = [False, "blocks"]
    if name == "leaf-level group offload" and kind.name == "WanPipeline":
        # Parameters of the model itself are moved by what replaces its forward.
        with pytest.raises(NotImplementedError, match="compile='blocks'"):
            afcache.compile_pipeline(pipe, compile=False)
        ways = ["blocks"]
    mixed = []
    for compile in ways:
        afcache.compile_pipeline(pipe, tolerance=0.0, compile=compile, backend="eager")
        assert difference(draw(pipe, kind, steps=STEPS, **options), expected) <= 1e-4
        afcache.compile_pipeline(pipe, MIXED, compile=compile, backend="eager")
        mixed.append(draw(pipe, kind, steps=STEPS, **options))
        assert {"F", "."} <= set(afcache.report(pipe).pattern())
        assert difference(mixed[-1], mixed[0]) <= 1e-4
    afcache.restore_pipeline(pipe)
    assert difference(draw(pipe, kind, steps=STEPS, **options), expected) == 0


@named(FOUR)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_adapters_scaled_and_switched(kind: Kind):
    """By arguments of the call, by the pipeline, and in a callback, after which the history is another model's."""
    pipe, options = kind.make(), options_of(kind)
    add_lora(pipe)
    add_lora(pipe, "second")
    pipe.transformer.set_adapter("first")
    half = {SCALED.get(kind.name, "attention_kwargs"): {"scale": 0.5}}

    def switch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        del timestep, tensors
        pipe.transformer.set_adapter("second" if step >= 3 else "first")
        return {}

    draws: list[dict[str, Any]] = [half, {}, {"callback_on_step_end": switch}]
    expected = []
    for changes in draws:
        pipe.transformer.set_adapter("first")
        expected.append(draw(pipe, kind, steps=STEPS, **options, **changes))
    assert difference(expected[0], expected[1]) > 0
    assert difference(expected[2], expected[1]) > 0
    afcache.compile_pipeline(pipe, tolerance=0.0, compile=False)
    for changes, latents in zip(draws, expected, strict=True):
        pipe.transformer.set_adapter("first")
        assert difference(draw(pipe, kind, steps=STEPS, **options, **changes), latents) <= 1e-4
    assert [restart.step for restart in afcache.report(pipe).restarts if restart.reason == "weights"] == [4]


@named(FOUR)
def test_in_bfloat16(kind: Kind):
    kind = kind._replace(arguments=lambda pipe, prompt, given=kind.arguments: lower(given(pipe, prompt)))
    pipe, options = kind.make(), lower(options_of(kind))
    pipe.to(torch.bfloat16)
    expected = draw(pipe, kind, steps=STEPS, **options)
    afcache.compile_pipeline(pipe, tolerance=0.0, compile=False)
    assert difference(draw(pipe, kind, steps=STEPS, **options), expected) <= 1e-4
    assert not [restart for restart in afcache.report(pipe).restarts if restart.reason == "latents"]
    afcache.compile_pipeline(pipe, MIXED, compile=False)
    assert torch.isfinite(draw(pipe, kind, steps=STEPS, **options)).all()
    assert {"F", "."} <= set(afcache.report(pipe).pattern())


@named(FOUR)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "int8 weights", "layerwise casting", "model offload"])
def test_weights_in_one_graph(kind: Kind, name: str):
    pipe, options = kind.make(), options_of(kind)
    WEIGHTS[name](pipe)
    afcache.compile_pipeline(pipe, MIXED, compile=False)
    eager = draw(pipe, kind, steps=STEPS, **options)
    branches = afcache.report(pipe).branches
    counters().clear()
    afcache.compile_pipeline(pipe, MIXED, backend="aot_eager")
    for _ in range(2):
        assert difference(draw(pipe, kind, steps=STEPS, **options), eager) <= 1e-4
    assert counters()["stats"]["unique_graphs"] <= branches
    assert not counters()["graph_break"]
