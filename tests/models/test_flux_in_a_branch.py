"""The functional forward inside of torch.cond, in the precision and with the fake weights of a model too large to be here."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from afcache.functional.model import model_of, scaled_dot_product_attention
from afcache.functional.outputs import full_forward
from afcache.models.flux1.architecture import FLUX
from afcache.models.flux1.inputs import FluxInputs
from tests.support.tiny import tiny_flux


def bfloat16_flux() -> FluxTransformer2DModel:
    """Fake weights cannot be cast by `Module.to`, so they are made in bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return tiny_flux(num_attention_heads=1)
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
