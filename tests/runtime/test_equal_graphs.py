"""What tests leave out: AOT looks at a graph once, and at every graph that differs in anything."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from afcache.functional.branch import branch


def make_step(factor: float, *, swaps: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    def step(x: Tensor, is_scaled: Tensor) -> Tensor:
        ways = (lambda: factor * x, lambda: x + 1)
        return branch(is_scaled, *(reversed(ways) if swaps else ways))

    return step


def trace(function: Any, *arguments: Any) -> tuple[Any, int]:
    """The result, and how many graphs AOT looked at, of a trace of its own."""
    torch._dynamo.reset()
    counters.clear()
    result = torch.compile(function, backend="aot_eager", fullgraph=True)(*arguments)
    assert counters["stats"]["unique_graphs"] == 1
    return result, counters["aot_autograd"]["total"]


@torch.no_grad()
def test_an_equal_graph_is_looked_at_once_and_reads_its_own_weights():
    for is_scaled in (True, False):
        x, yes = torch.arange(5.0), torch.tensor(is_scaled)
        expected = make_step(3.25)(x, yes)
        results = [trace(make_step(3.25), x, yes) for _ in range(2)]
        assert all(torch.equal(result, expected) for result, _ in results)
        assert results[1][1] == 0
    layers = [nn.Linear(3, 2) for _ in range(2)]
    found = [trace(layer, torch.ones(3)) for layer in layers]
    assert [looks for _, looks in found] == [1, 0]
    for layer, (result, _) in zip(layers, found, strict=True):
        assert torch.equal(result, layer(torch.ones(3)))


@pytest.mark.parametrize(
    ("step", "x"),
    [
        (make_step(2.5), torch.ones(4)),
        (make_step(2.0, swaps=True), torch.ones(4)),
        (make_step(2.0), torch.ones(5)),
        (make_step(2.0), torch.ones(4, dtype=torch.float64)),
        (make_step(2.0), torch.ones(8)[::2]),
        (make_step(2.0), torch.ones(4, requires_grad=True)),
    ],
    ids=["constant", "order of branches", "shape", "dtype", "strides", "gradient"],
)
@torch.no_grad()
def test_another_graph_is_looked_at(step: Any, x: Tensor):
    yes = torch.tensor(True)
    trace(make_step(2.0), torch.ones(4), yes)
    result, looks = trace(step, x, yes)
    assert looks == 1
    assert torch.equal(result, step(x, yes))


@torch.no_grad()
def test_inputs_that_share_memory_and_tensors_that_a_graph_holds_are_looked_at_each_time():
    both = torch.ones(2, 4)
    held = torch.ones(4)
    for _ in range(2):
        assert trace(lambda x, y: x + 2 * y, both[0], both[1])[1] == 1
        # A tensor that is made while tracing is the graph's own.
        assert torch.equal(trace(lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), held)[0], held + torch.arange(1.0, 5.0))


@torch.no_grad()
def test_under_autocast_a_graph_is_another():
    layer = nn.Linear(3, 2)
    plain, _ = trace(layer, torch.ones(3))
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = trace(layer, torch.ones(3))
    assert (plain.dtype, cast.dtype) == (torch.float32, torch.bfloat16)
