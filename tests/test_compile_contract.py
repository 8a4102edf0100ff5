"""Facts about torch.cond and torch.compile that the design rests on: a torch upgrade announces here what changed."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from beartype import beartype
from einops import rearrange
from jaxtyping import Float, jaxtyped
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

X = torch.arange(6.0).reshape(2, 3)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def cond(x: Tensor, if_true: Callable[[], Any], if_false: Callable[[], Any]) -> Any:
    return torch.cond(x.sum() > 0, if_true, if_false, ())


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_checked_functions_do_not_trace():
    @jaxtyped(typechecker=beartype)
    def double(x: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        return 2 * x

    with pytest.raises(TorchDynamoException):
        compiled(double)(X)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclasses.dataclass(frozen=True)
class FrozenPair:
    first: Tensor
    second: Tensor


def test_named_tuples_survive_as_captures_and_results_of_branches():
    def step(pair: Pair) -> Pair:
        return cond(
            pair.first,
            lambda: Pair(pair.first + 1, pair.second + 1),
            lambda: Pair(pair.first - 1, pair.second - 1),
        )

    result = compiled(step)(Pair(X, 2 * X))
    assert isinstance(result, Pair)
    assert torch.equal(result.second, 2 * X + 1)


def test_frozen_dataclasses_fail_as_results_of_branches():
    def step(x: Tensor) -> Any:
        return cond(x, lambda: FrozenPair(x + 1, x + 1), lambda: FrozenPair(x - 1, x - 1))

    with pytest.raises(TorchDynamoException):
        compiled(step)(X)


@pytest.mark.parametrize(
    ("if_true", "if_false"),
    [
        (lambda x: x, lambda x: x + 1),
        (lambda x: x.add_(1), lambda x: x + 1),
        (lambda x: (x + 1).to(torch.float64), lambda x: x + 1),
        (lambda x: (x + 1).sum(), lambda x: x + 1),
        (lambda x: (x + 1).t().contiguous().t(), lambda x: x + 1),
    ],
    ids=["input unchanged", "in place", "dtype", "number of axes", "stride"],
)
def test_branches_that_alias_mutate_or_differ_fail(if_true: Callable[[Tensor], Tensor], if_false: Callable[[Tensor], Tensor]):
    def step(x: Tensor) -> Tensor:
        return cond(x, lambda: if_true(x), lambda: if_false(x))

    with pytest.raises(TorchDynamoException):
        compiled(step)(X.clone())


def test_a_closure_that_captures_a_tensor_and_its_view_fails():
    def step(x: Tensor) -> Tensor:
        view = x[:, :2]
        return cond(x, lambda: x.sum() + view.sum(), lambda: x.sum() - view.sum())

    with pytest.raises(TorchDynamoException):
        compiled(step)(X)


def test_a_changing_python_number_recompiles_and_a_tensor_does_not():
    def step(x: Tensor, index: Any) -> Tensor:
        return x * (index + 1)

    function = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False)
    for index in range(3):
        function(X, index)
    assert num_graphs() == 3
    for index in range(3):
        function(X, torch.tensor(index))
    assert num_graphs() == 4


def test_einops_traces_inside_a_branch():
    def step(x: Tensor) -> Tensor:
        return cond(x, lambda: rearrange(x, "a b -> (b a)") + 1, lambda: rearrange(x, "a b -> (a b)") - 1)

    assert torch.equal(compiled(step)(X), X.t().reshape(-1) + 1)
    assert num_graphs() == 1
