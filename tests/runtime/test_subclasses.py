"""Quantised weights as operands of torch.cond."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

from afcache.functional.branch import branch
from afcache.runtime.subclasses import is_subclass, opening, take_apart

KINDS = {
    "weights": Int8WeightOnlyConfig(set_inductor_config=False),
    "weights and activations": Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
}


def make_layer(kind: str = "weights") -> Any:
    layer = nn.Linear(32, 32).requires_grad_(False)
    quantize_(layer, KINDS[kind])
    return layer


class Pair(Tensor):
    """Two tensors, either of which may be a subclass itself."""

    @staticmethod
    def __new__(cls, first: Tensor, second: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, first.shape, dtype=first.dtype)

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.first, self.second = first, second

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        return ["first", "second"], "context"

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: str, size: Any, stride: Any) -> Any:
        del size, stride
        assert context == "context"
        return Pair(inner["first"], inner["second"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


def test_take_apart_finds_all_parts_and_their_order():
    tensors = [torch.full((2,), float(i)) for i in range(4)]
    parts, put_together = take_apart(Pair(Pair(tensors[0], tensors[1]), Pair(tensors[2], tensors[3])))
    assert all(part is tensor for part, tensor in zip(parts, tensors, strict=True))
    again = put_together(iter(parts[::-1]))
    assert again.first.first is tensors[3]
    assert again.second.second is tensors[0]


def test_what_is_no_subclass_is_its_own_only_part():
    for value in (torch.ones(2), 3):
        parts, put_together = take_apart(value)
        assert parts == [value]
        assert put_together(iter(parts)) is value


def test_take_apart_restores_a_quantised_weight():
    weight = make_layer().weight
    parts, put_together = take_apart(weight)
    assert is_subclass(weight)
    assert not any(is_subclass(part) for part in parts)
    assert torch.equal(put_together(iter(parts)).dequantize(), weight.dequantize())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_opening_lets_a_branch_read_quantised_weights(kind: str):
    layer, x = make_layer(kind), torch.randn(3, 32)

    def step(x: Tensor, is_computed: Tensor) -> Tensor:
        return branch(is_computed, lambda: layer(x), lambda: x.clone())

    compiled = torch.compile(step, backend=opening(torch._dynamo.lookup_backend("aot_eager")), fullgraph=True)
    assert torch.allclose(compiled(x, torch.tensor(True)), layer(x))
    assert torch.equal(compiled(x, torch.tensor(False)), x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.contract
@torch.no_grad()
def test_torch_does_not_do_that_yet():
    """The day this fails, `opening` can go."""
    layer = make_layer()

    def step(x: Tensor, is_computed: Tensor) -> Tensor:
        return branch(is_computed, lambda: layer(x), lambda: x.clone())

    with pytest.raises(BackendCompilerFailed, match="no rule registered for HOP cond and subclass"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(torch.randn(3, 32), torch.tensor(True))
