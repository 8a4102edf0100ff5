import pytest
import torch

from afcache.functional.branch import branch


@pytest.mark.parametrize("taken", [True, False])
def test_branch_runs_only_the_chosen_closure_in_eager_mode(taken: bool):
    calls = []

    def closure(name: bool):
        calls.append(name)
        return torch.full((2,), float(name))

    result = branch(torch.tensor(taken), lambda: closure(True), lambda: closure(False))
    assert calls == [taken]
    assert result.tolist() == [float(taken)] * 2


def test_branch_compiles_to_one_graph_that_takes_both_branches():
    def step(x: torch.Tensor) -> torch.Tensor:
        return branch(x.sum() > 0, lambda: x + 1, lambda: x - 1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert compiled(torch.ones(3)).tolist() == [2.0] * 3
    assert compiled(-torch.ones(3)).tolist() == [-2.0] * 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
