import pytest
import torch
from jaxtyping import TypeCheckError

from afcache._typing import Heads, PerSample, typed, unchecked
from afcache.functional.branch import branch


@typed
def scale(x: Heads, factor: PerSample) -> Heads:
    return x * factor[:, None, None, None]


def test_typed_accepts_matching_shapes():
    assert scale(torch.ones(2, 1, 3, 4), torch.tensor([1.0, 2.0])).sum() == 36


def test_typed_refuses_shapes_that_disagree_between_arguments():
    with pytest.raises(TypeCheckError, match="batch"):
        scale(torch.ones(2, 1, 3, 4), torch.ones(3))


def test_checks_can_be_left_out_and_come_back():
    with unchecked():
        assert scale(torch.ones(2, 1, 3, 4), torch.ones(1)).sum() == 24
    with pytest.raises(TypeCheckError):
        scale(torch.ones(2, 1, 3, 4), torch.ones(1))


def test_typed_traces_as_one_graph():
    compiled = torch.compile(scale, fullgraph=True, backend="eager")
    assert compiled(torch.ones(2, 1, 3, 4), torch.tensor([1.0, 2.0])).sum() == 36


@pytest.mark.parametrize("is_positive", [True, False])
def test_typed_traces_inside_a_branch(is_positive: bool):
    def step(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return branch(factor.sum() > 0, lambda: scale(x, factor), lambda: -scale(x, factor))

    x, factor = torch.ones(2, 1, 3, 4), torch.tensor([1.0, 2.0]) * (1 if is_positive else -1)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, factor), scale(x, factor.abs()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    # Outside of compilation torch.cond traces its branches, too.
    traced = torch.cond(factor.sum() > 0, lambda: scale(x, factor), lambda: -scale(x, factor), ())
    assert torch.equal(traced, scale(x, factor.abs()))


def test_an_integer_is_a_float_but_no_text_is():
    @typed
    def double(value: float) -> float:
        return 2 * value

    assert double(3) == 6
    with pytest.raises(TypeCheckError):
        double("3")  # pyright: ignore[reportArgumentType]
