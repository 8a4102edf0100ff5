"""Facts about diffusers' FLUX under torch.cond that the design rests on: an upgrade announces here what changed."""

from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor
from torch._dynamo.exc import UncapturedHigherOrderOpError
from torch._dynamo.utils import counters

pytestmark = pytest.mark.contract


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
