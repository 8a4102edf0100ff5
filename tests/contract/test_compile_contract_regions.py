"""Facts about nested compile regions, inductor's code and CUDA graphs: a torch upgrade announces here what changed."""

import re
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import UncapturedHigherOrderOpError
from torch._dynamo.utils import counters
from torch._inductor.exc import InductorError
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule
from torch.nn.functional import silu

pytestmark = pytest.mark.contract
X = torch.arange(6.0).reshape(2, 3)
WEIGHTS = [torch.eye(3), 2 * torch.eye(3), 3 * torch.eye(3)]

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.compile)]


@pytest.fixture(autouse=True)
def no_gradients():
    """As the library samples."""
    with torch.no_grad():
        yield


def compiled(function: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend)


def nested(function: Callable[..., Any]) -> Callable[..., Any]:
    return cast("Callable[..., Any]", torch.compiler.nested_compile_region(function))


def capture(function: Callable[..., Any], *args: Any) -> GraphModule:
    """The graph that a backend is given to compile."""
    captured = []

    def compiler(module: GraphModule, inputs: Any) -> Callable[..., Any]:
        del inputs
        captured.append(module)
        return make_boxed_func(module.forward)

    compiled(function, aot_autograd(fw_compiler=compiler))(*args)
    (module,) = captured
    return module


def calls(module: GraphModule, operator: Any) -> list[torch.fx.Node]:
    return list(module.graph.find_nodes(op="call_function", target=operator))


def bodies(module: GraphModule) -> list[str]:
    """The shared body of every call of a region, in order."""
    nodes = calls(module, torch.ops.higher_order.invoke_subgraph)
    return [str(cast("torch.fx.Node", node.args[0]).target) for node in nodes]


def stack(region: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> Tensor:
    for weight in weights:
        x = region(x, weight)
    return x


def block(x: Tensor, weight: Tensor) -> Tensor:
    return silu(x @ weight)


def branching_block(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda: silu(x @ weight), lambda: x - 1, ())


region = nested(block)
branching_region = nested(branching_block)


def test_blocks_of_one_kind_share_a_region():
    module = capture(lambda x, weights: stack(region, x, weights), X, WEIGHTS)
    assert bodies(module) == ["repeated_subgraph0"] * 3
    assert not calls(module, torch.ops.aten.mm.default)


def test_blocks_of_other_shapes_have_a_region_of_their_own_and_a_single_call_has_none():
    weights = [*WEIGHTS, torch.ones(3, 4), torch.eye(4), torch.eye(4)]
    module = capture(lambda x, weights: stack(region, x, weights), X, weights)
    assert bodies(module) == ["repeated_subgraph0"] * 3 + ["repeated_subgraph1"] * 2
    assert len(calls(module, torch.ops.aten.mm.default)) == 1


@pytest.mark.compile
def test_inductor_writes_the_code_of_a_region_once():
    function = compiled(lambda x, weights: stack(region, x, weights), "inductor")
    result, (code,) = run_and_get_code(function, X, WEIGHTS)
    torch.testing.assert_close(result, stack(block, X, WEIGHTS))
    assert len(re.findall(r"^def repeated_subgraph\d", code, re.MULTILINE)) == 1
    assert len(re.findall(r"^ +\w+ = repeated_subgraph0\(", code, re.MULTILINE)) == 3


def test_a_region_with_cond_inside_is_shared():
    module = capture(lambda x, weights: stack(branching_region, x, weights), X, WEIGHTS)
    assert bodies(module) == ["repeated_subgraph0"] * 3
    body = cast("GraphModule", module.get_submodule("repeated_subgraph0"))
    assert len(calls(body, torch.ops.higher_order.cond)) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_region_with_cond_inside_takes_both_branches(backend: str):
    function = compiled(lambda x, weights: stack(branching_region, x, weights), backend)
    torch.testing.assert_close(function(X, WEIGHTS), stack(block, X, WEIGHTS))
    torch.testing.assert_close(function(-X, WEIGHTS), -X - 3)
    assert counters["stats"]["unique_graphs"] == 1


def regions_in_a_branch(operator: Callable[[Tensor], Tensor], num_calls: int) -> Callable[[Tensor], Tensor]:
    inner = nested(lambda x: operator(x))

    def if_true(x: Tensor) -> Tensor:
        for _ in range(num_calls):
            x = inner(x)
        return x

    return lambda x: torch.cond(x.sum() > 0, lambda: if_true(x), lambda: x - 1, ())


def test_regions_in_a_branch_compile_without_inductor():
    function = compiled(regions_in_a_branch(silu, 2), "aot_eager")
    torch.testing.assert_close(function(X), silu(silu(X)))
    torch.testing.assert_close(function(-X), -X - 1)


@pytest.mark.compile
@pytest.mark.parametrize(("operator", "name"), [(silu, "silu"), (lambda x: x.softmax(-1), "_softmax")], ids=["silu", "softmax"])
def test_regions_in_a_branch_fail_in_inductor(operator: Callable[[Tensor], Tensor], name: str):
    """The check of the branch for aliases traces the region without decompositions, and that graph is kept."""
    with pytest.raises(InductorError, match=rf"both a fallback and a decomp for same op: aten\.{name}\.default"):
        compiled(regions_in_a_branch(operator, 2), "inductor")(X)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("operator", "num_calls"),
    [(silu, 1), (torch.sin, 2)],
    ids=["called once, hence no region", "nothing to decompose"],
)
def test_regions_in_a_branch_that_inductor_compiles(operator: Callable[[Tensor], Tensor], num_calls: int):
    function = regions_in_a_branch(operator, num_calls)
    expected = operator(X) if num_calls == 1 else operator(operator(X))
    torch.testing.assert_close(compiled(function, "inductor")(X), expected)


@pytest.mark.parametrize(
    "split",
    [lambda x: (x, x[:1]), lambda x: x.split(1)],
    ids=["tensor and view", "disjoint views"],
)
def test_arguments_of_a_region_that_are_views_of_one_tensor_fail(split: Callable[[Tensor], tuple[Tensor, Tensor]]):
    """Text and image tokens cut from the joint sequence are such views."""
    add = nested(lambda x, y: x + y)
    with pytest.raises(UncapturedHigherOrderOpError, match=r"(?s)invoke_subgraph.*Input-to-input aliasing"):
        compiled(lambda x: add(*split(x)), "aot_eager")(X)


def test_one_tensor_given_twice_to_a_region_works():
    add = nested(lambda x, y: x + y)
    assert torch.equal(compiled(lambda x: add(x, x), "aot_eager")(X), 2 * X)


@pytest.mark.compile
@pytest.mark.parametrize("num_conds", [1, 3])
def test_inductor_asks_the_host_once_per_cond(num_conds: int):
    """`.item()` is where a predicate on an accelerator makes the host wait."""

    def step(x: Tensor) -> Tensor:
        for _ in range(num_conds):
            x = torch.cond(x.sum() > 0, lambda x: silu(x), lambda x: x - 1, (x,))
        return x

    _, (code,) = run_and_get_code(compiled(step, "inductor"), X)
    assert code.count(".item()") == num_conds
    assert len(re.findall(r"^ +if \w+\.item\(\):$", code, re.MULTILINE)) == num_conds


@pytest.mark.compile
def test_inductor_asks_the_host_at_every_call_of_a_region_with_cond_inside():
    """The code asks once, in the body that is called three times: sharing regions saves no synchronisation."""
    _, (code,) = run_and_get_code(compiled(lambda x, weights: stack(branching_region, x, weights), "inductor"), X, WEIGHTS)
    assert len(re.findall(r"^    if \w+\.item\(\):$", code, re.MULTILINE)) == code.count(".item()") == 1
    assert len(re.findall(r"^ +\w+ = repeated_subgraph0\(", code, re.MULTILINE)) == 3


@pytest.mark.compile
def test_inductor_cannot_return_an_int_from_a_branch():
    def step(x: Tensor) -> tuple[Tensor, int]:
        return torch.cond(x.sum() > 0, lambda: (x + 1, 1), lambda: (x - 1, 2), ())

    assert compiled(step, "aot_eager")(X)[1] == 1
    with pytest.raises(InductorError, match="'ShapeAsConstantBuffer' object has no attribute 'dtype'"):
        compiled(step, "inductor")(X)


@pytest.mark.gpu
@pytest.mark.compile
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_outputs_of_cuda_graphs_are_overwritten_by_the_next_call():
    """Warm-up and recording guard what they returned; replays, from the third call on, overwrite it in silence."""
    function = torch.compile(lambda x: x + 1, fullgraph=True, mode="reduce-overhead")
    x = torch.zeros(4, device="cuda")
    warmed_up = function(x)
    kept = warmed_up.clone()
    recorded = function(x)
    with pytest.raises(RuntimeError, match="overwritten by a subsequent run"):
        warmed_up.sum()
    replayed = function(x)
    with pytest.raises(RuntimeError, match="overwritten by a subsequent run"):
        recorded.sum()
    assert replayed.tolist() == [1] * 4
    function(x + 1)
    assert replayed.tolist() == [2] * 4
    assert kept.tolist() == [1] * 4
