import pytest
import torch
from jaxtyping import TypeCheckError

from afcache._typing import Heads, PerSample, typed


@typed
def scale(x: Heads, factor: PerSample) -> Heads:
    return x * factor[:, None, None, None]


def test_typed_accepts_matching_shapes():
    assert scale(torch.ones(2, 1, 3, 4), torch.tensor([1.0, 2.0])).sum() == 36


def test_typed_refuses_shapes_that_disagree_between_arguments():
    with pytest.raises(TypeCheckError, match="batch"):
        scale(torch.ones(2, 1, 3, 4), torch.ones(3))


def test_typed_traces_as_one_graph():
    compiled = torch.compile(scale, fullgraph=True, backend="eager")
    assert compiled(torch.ones(2, 1, 3, 4), torch.tensor([1.0, 2.0])).sum() == 36
