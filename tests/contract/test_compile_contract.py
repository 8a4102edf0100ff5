"""Facts about torch.cond and torch.compile that the design rests on: a torch upgrade announces here what changed.

Where torch turned out more lenient than the rule that the library keeps, the test pins what torch does. Regions, inductor
and CUDA graphs are in test_compile_contract_regions.py, diffusers' FLUX is in test_compile_contract_flux.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from beartype import beartype
from einops import rearrange
from jaxtyping import Float, jaxtyped
from torch import Tensor
from torch._dynamo.exc import (
    BackendCompilerFailed,
    TorchDynamoException,
    TorchRuntimeError,
    UncapturedHigherOrderOpError,
    Unsupported,
    UserError,
)
from torch._dynamo.utils import counters

pytestmark = pytest.mark.contract
X = torch.arange(6.0).reshape(2, 3)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def cond(x: Tensor, if_true: Callable[[], Any], if_false: Callable[[], Any]) -> Any:
    return torch.cond(x.sum() > 0, if_true, if_false, ())


def branching(if_true: Callable[[Tensor], Any], if_false: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    return lambda x: cond(x, lambda: if_true(x), lambda: if_false(x))


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def double(x: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    return 2 * x


checked_double = jaxtyped(typechecker=beartype)(double)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Nested(NamedTuple):
    pair: Pair
    third: Tensor


@dataclasses.dataclass(frozen=True)
class FrozenPair:
    first: Tensor
    second: Tensor


def test_eager_cond_starts_dynamo_for_every_new_closure():
    """New by its code, or by what it captures: one line's closures over tensors of one shape are traced once."""

    def step(x: Tensor, number: float) -> Tensor:
        return cond(x, lambda: x + number, lambda: x - number)

    assert torch.equal(step(X, 1.0), X + 1)
    assert num_graphs() == 1
    assert torch.equal(step(2 * X, 1.0), 2 * X + 1)
    assert num_graphs() == 1
    assert torch.equal(step(X, 2.0), X + 2)
    assert num_graphs() == 2
    assert torch.equal(cond(X, lambda: X + 2, lambda: X - 2), X + 2)
    assert num_graphs() == 3


@pytest.mark.parametrize(
    ("function", "error", "match"),
    [
        (compiled(checked_double), Unsupported, r"(?s)does not know how to trace method `replace`.*jaxtyping"),
        (compiled(branching(checked_double, double)), UncapturedHigherOrderOpError, r"(?s)Unsafe side effect.*jaxtyping"),
        (branching(checked_double, double), UncapturedHigherOrderOpError, r"(?s)Unsafe side effect.*jaxtyping"),
    ],
    ids=["function", "branch", "branch of eager cond"],
)
def test_checked_functions_do_not_trace(function: Callable[..., Any], error: type[TorchDynamoException], match: str):
    # The checker makes its thread-local state at its first call; before that, branches fail by another message.
    assert torch.equal(checked_double(X), 2 * X)
    with pytest.raises(error, match=match):
        function(X)


def test_nested_named_tuples_survive_as_captures_and_results_of_branches():
    def step(nested: Nested) -> Nested:
        (first, second), third = nested
        return cond(
            third,
            lambda: Nested(Pair(first + 1, second + 1), third + 1),
            lambda: Nested(Pair(nested.pair.first - 1, nested.pair.second - 1), nested.third - 1),
        )

    for sign in (1, -1):
        result = compiled(step)(Nested(Pair(sign * X, 2 * X), sign * 3 * X))
        assert isinstance(result, Nested)
        assert isinstance(result.pair, Pair)
        assert torch.equal(result.pair.second, 2 * X + sign)
    assert num_graphs() == 1


def test_named_tuples_fail_as_operands():
    def step(operand: Any) -> Tensor:
        return torch.cond(operand[0].sum() > 0, lambda pair: pair[0] + pair[1], lambda pair: pair[0] - pair[1], (operand,))

    assert torch.equal(compiled(step)((X, 2 * X)), 3 * X)
    with pytest.raises(UncapturedHigherOrderOpError, match="improper operands contents"):
        compiled(step)(Pair(X, 2 * X))


def test_frozen_dataclasses_fail_as_results_of_branches():
    step = branching(lambda x: FrozenPair(x + 1, x + 1), lambda x: FrozenPair(x - 1, x - 1))
    with pytest.raises(UncapturedHigherOrderOpError, match=r"output must consist of tensors.* but got <class '.*FrozenPair'>"):
        compiled(step)(X)


@pytest.mark.parametrize(
    ("if_true", "error", "match"),
    [
        (lambda x: x, UncapturedHigherOrderOpError, "Input-to-output aliasing"),
        (lambda x: x.add_(1), UncapturedHigherOrderOpError, "Encountered input mutation"),
        (lambda x: (x + 1).double(), TorchRuntimeError, r"same dtype but got torch\.float64 and torch\.float32"),
        (lambda x: (x + 1).sum(), TorchRuntimeError, "same dim but got 0 and 2"),
        (lambda x: (x + 1).t().contiguous().t(), TorchRuntimeError, "sorted order of strides"),
        (lambda x: (x + 1, x + 2), TorchRuntimeError, "Unmatched output spec"),
    ],
    ids=["input unchanged", "in place", "dtype", "number of axes", "stride", "structure"],
)
def test_branches_that_alias_mutate_or_differ_fail(
    if_true: Callable[[Tensor], Tensor], error: type[TorchDynamoException], match: str
):
    with pytest.raises(error, match=match):
        compiled(branching(if_true, lambda x: x + 1))(X.clone())


@torch.no_grad()
def test_without_gradients_aliases_still_fail_and_edits_in_place_do_not():
    """The library samples without gradients: torch does not keep its rule against edits in place there."""
    with pytest.raises(BackendCompilerFailed, match="cond_true might be aliasing the input or the output"):
        compiled(branching(lambda x: x, lambda x: x + 1))(X)
    x = X.clone()
    compiled(branching(lambda x: x.add_(1) * 2, lambda x: x + 1))(x)
    assert torch.equal(x, X + 1)


def test_branches_of_different_sizes_do_not_fail():
    """Torch makes the size of the result dynamic: it does not notice a branch that returns the wrong size."""
    step = compiled(branching(lambda x: x[:1] + 1, lambda x: x - 1))
    assert torch.equal(step(X), X[:1] + 1)
    assert torch.equal(step(-X), -X - 1)
    assert num_graphs() == 1


@pytest.mark.parametrize(
    ("if_true", "if_false", "error", "match"),
    [
        (1.0, 2.0, UncapturedHigherOrderOpError, "must consist of tensors or ints/bools only but got <class 'float'>"),
        (True, False, TorchRuntimeError, "expected both a and b to be FakeTensor, got a=<class 'bool'>"),
        (None, None, UncapturedHigherOrderOpError, "Constants returned from branches must be ints"),
    ],
    ids=["float", "bool", "None"],
)
def test_python_values_fail_as_results_of_branches(if_true: Any, if_false: Any, error: type[TorchDynamoException], match: str):
    with pytest.raises(error, match=match):
        compiled(branching(lambda x: (x + 1, if_true), lambda x: (x - 1, if_false)))(X)


def test_ints_as_results_of_branches_are_symbols_that_python_cannot_decide_on():
    count = branching(lambda x: (x + 1, 1), lambda x: (x - 1, 2))
    assert compiled(count)(X)[1] == 1
    assert compiled(count)(-X)[1] == 2
    with pytest.raises(UserError, match="Could not guard on data-dependent expression"):
        compiled(lambda x: x if count(x)[1] == 1 else -x)(X)


@pytest.mark.parametrize("split", [lambda x: (x, x[:1]), lambda x: x.split(1)], ids=["tensor and view", "disjoint views"])
@pytest.mark.parametrize(
    ("gradients", "error", "match"),
    [
        (True, UncapturedHigherOrderOpError, "Input-to-input aliasing"),
        (False, BackendCompilerFailed, "cond_true might be aliasing the input or the output"),
    ],
    ids=["gradients", "no gradients"],
)
def test_a_closure_that_captures_two_views_of_one_tensor_fails(
    split: Callable[[Tensor], tuple[Tensor, Tensor]], gradients: bool, error: type[TorchDynamoException], match: str
):
    def step(x: Tensor, *, clone: bool = False) -> Tensor:
        first, second = split(x)
        second = second.clone() if clone else second
        return cond(x, lambda: first + second, lambda: first - second)

    with torch.set_grad_enabled(gradients):
        with pytest.raises(error, match=match):
            compiled(step)(X)
        assert torch.equal(compiled(step)(X, clone=True), step(X, clone=True))


@pytest.mark.parametrize("kind", [int, float])
def test_a_changing_python_number_recompiles_and_a_tensor_does_not(kind: Callable[[int], Any]):
    def step(x: Tensor, number: Any) -> Tensor:
        return x * (number + 1)

    function = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False)
    for index in range(3):
        function(X, kind(index))
    assert num_graphs() == 3
    for index in range(3):
        function(X, torch.tensor(kind(index)))
    assert num_graphs() == 4


def test_einops_traces_inside_a_branch():
    step = branching(lambda x: rearrange(x, "a b -> (b a)") + 1, lambda x: rearrange(x, "a b -> (a b)") - 1)
    assert torch.equal(compiled(step)(X), X.t().reshape(-1) + 1)
    assert num_graphs() == 1


def test_a_float32_statistic_beside_bfloat16_features_makes_the_branches_differ_unless_cast():
    def step(x: Tensor, weight: Tensor, *, cast: bool) -> Tensor:
        return cond(x, lambda: x + 1, lambda: (weight * x).to(x.dtype) if cast else weight * x)

    features, weight = X.to(torch.bfloat16), torch.ones(1)
    with pytest.raises(TorchRuntimeError, match=r"expected same dtype but got torch\.bfloat16 and torch\.float32"):
        compiled(step)(features, weight, cast=False)
    assert compiled(step)(features, weight, cast=True).dtype == torch.bfloat16
