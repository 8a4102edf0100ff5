"""Facts about diffusers' FLUX under torch.cond that the design rests on: an upgrade announces here what changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor
from torch._dynamo.exc import UncapturedHigherOrderOpError
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from afcache.functional.model import model_of, scaled_dot_product_attention
from afcache.functional.step import full_forward
from afcache.models.flux1.architecture import FLUX
from afcache.models.flux1.inputs import FluxInputs


def joint_attention() -> FluxAttention:
    return FluxAttention(query_dim=8, heads=2, dim_head=4, out_dim=8, bias=True, added_kv_proj_dim=8, context_pre_only=False)


@pytest.mark.host
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.compile)])
@torch.no_grad()
def test_the_hosts_attention_traces_inside_a_branch(backend: str):
    """It calls inspect.signature, which was thought to stop it; the functional form does not depend on this."""
    attention, image, text = joint_attention(), torch.randn(1, 4, 8), torch.randn(1, 2, 8)

    def step(flag: Tensor, image: Tensor, text: Tensor) -> Any:
        return torch.cond(flag, lambda: attention(image, text), lambda: (image + 1, text + 1), ())

    function = torch.compile(step, fullgraph=True, backend=backend)
    torch.testing.assert_close(function(torch.tensor(True), image, text), attention(image, text))
    torch.testing.assert_close(function(torch.tensor(False), image, text), (image + 1, text + 1))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.host
@torch.no_grad()
def test_the_hosts_attention_fails_inside_a_branch_when_it_has_to_warn():
    attention = joint_attention()

    def step(flag: Tensor, image: Tensor, text: Tensor) -> Any:
        return torch.cond(flag, lambda: attention(image, text, unknown=1), lambda: (image + 1, text + 1), ())

    with pytest.raises(UncapturedHigherOrderOpError, match=r"logging\.Logger method not supported"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(torch.tensor(True), torch.randn(1, 4, 8), torch.randn(1, 2, 8))


def bfloat16_flux() -> FluxTransformer2DModel:
    """Fake weights cannot be cast by `Module.to`, so they are made in bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=1,
            joint_attention_dim=4,
            pooled_projection_dim=4,
            axes_dims_rope=(2, 2, 4),
        )
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def test_a_bfloat16_flux_inside_a_branch_is_captured_without_memory_as_one_graph():
    captured = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        del inputs
        captured.append(module)
        return module.forward

    def step(flag: Tensor, velocity: Tensor, inputs: FluxInputs) -> Tensor:
        return torch.cond(
            flag,
            lambda: full_forward(model_of(transformer, FLUX, scaled_dot_product_attention), inputs),
            lambda: 2 * velocity,
            (),
        )

    with FakeTensorMode():
        transformer = bfloat16_flux()
        velocity = torch.randn(1, 4, 4, dtype=torch.bfloat16)
        text, pooled = torch.randn(1, 2, 4, dtype=torch.bfloat16), torch.randn(1, 4, dtype=torch.bfloat16)
        positions = torch.zeros(4, 3), torch.zeros(2, 3)
        inputs = FluxInputs(velocity + 1, text, pooled, torch.rand(1), *positions, guidance=None)
        result = torch.compile(step, fullgraph=True, backend=backend)(torch.tensor(True), velocity, inputs)
    assert isinstance(result, FakeTensor)
    assert (result.shape, result.dtype) == (velocity.shape, torch.bfloat16)
    assert len(captured) == 1
    assert len(captured[0].graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond)) == 1
