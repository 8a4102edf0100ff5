"""Each strategy by itself, on hand-made tensors, and how a proposal is carried out."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from afcache.functional.groups.proposal import Decided, Memory, Proposal
from afcache.functional.groups.proposal import carry_out as carry_out_decided
from afcache.functional.groups.strategies.attention import attention
from afcache.functional.groups.strategies.difference import difference
from afcache.functional.groups.strategies.similarity import similarity
from afcache.functional.groups.strategies.taylor import taylor

BATCH, SEQ, DIM, BLOCKS = 2, 3, 4, 2


def make_memory(**fields: Tensor) -> Memory:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    values = {
        "history": random(2, BATCH, SEQ, DIM),
        "nodes": torch.tensor([[0.6], [0.8]]).expand(2, BATCH).clone(),
        "steps": torch.tensor([[4.0], [2.0]]).expand(2, BATCH).clone(),
        "num_nodes": torch.tensor([2, 2]),
        "inputs": random(BATCH, SEQ, DIM),
        "modulated": random(BATCH, SEQ, DIM),
        "attention_map": random(BATCH, SEQ, SEQ).softmax(dim=-1),
        "attention": random(BLOCKS, BATCH, SEQ, DIM),
    }
    return Memory(**{**values, **fields})


MEMORY = make_memory()
THRESHOLDS = torch.full((BATCH,), 0.1)


def turned(x: Tensor, angle: float) -> Tensor:
    """A tensor of the same norm at an angle to x, per sample."""
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    share = (other * x).sum((1, 2), keepdim=True) / x.square().sum((1, 2), keepdim=True)
    other = other - share * x
    other = other * x.norm(dim=(1, 2), keepdim=True) / other.norm(dim=(1, 2), keepdim=True)
    return math.cos(angle) * x + math.sin(angle) * other


def spread(p: Tensor, amount: float) -> Tensor:
    """An attention map whose rows moved `amount` of their mass from the first key to the last."""
    moved = p.clone()
    moved[..., 0] -= amount
    moved[..., -1] += amount
    return moved


EVEN_MAP = torch.full((BATCH, SEQ, SEQ), 1 / SEQ)
# (strategy, memory, its argument for a given distance)
Case = tuple[Callable[..., Proposal], Memory, Callable[[float], Tensor]]
CASES: dict[str, Case] = {
    "similarity": (similarity, MEMORY, lambda d: turned(MEMORY.inputs, math.acos(1 - d))),
    "difference": (difference, MEMORY, lambda d: MEMORY.modulated * (1 + d)),
    "attention": (attention, MEMORY._replace(attention_map=EVEN_MAP), lambda d: spread(EVEN_MAP, d)),
}


@pytest.fixture(params=sorted(CASES))
def case(request) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize("distance", [0.05, 0.2])
def test_distance_is_the_closed_forms(case: Case, distance: float):
    strategy, memory, at = case
    proposal = strategy(memory, at(distance), threshold=THRESHOLDS)
    torch.testing.assert_close(proposal.distance, torch.full((BATCH,), distance), rtol=1e-3, atol=1e-6)
    assert proposal.is_valid.tolist() == [distance < 0.1] * BATCH
    assert torch.equal(proposal.residual, memory.history[0])


def test_threshold_zero_never_reuses(case: Case):
    strategy, memory, at = case
    assert not strategy(memory, at(0.0), threshold=torch.zeros(BATCH)).is_valid.any()


def test_without_a_history_nothing_is_reused(case: Case):
    strategy, memory, at = case
    empty = memory._replace(num_nodes=torch.tensor([0, 2]))
    assert strategy(empty, at(0.01), threshold=THRESHOLDS).is_valid.tolist() == [False, True]


def test_nan_is_not_reused(case: Case):
    strategy, memory, at = case
    seen = at(0.01)
    seen[0, 0, 0] = float("nan")
    assert strategy(memory, seen, threshold=THRESHOLDS).is_valid.tolist() == [False, True]


def test_samples_do_not_depend_on_their_neighbours(case: Case):
    strategy, memory, at = case
    seen = at(0.05)
    other = torch.cat([seen[:1], 3 * torch.randn_like(seen[1:])])
    together, apart = (strategy(memory, x, threshold=THRESHOLDS) for x in (seen, other))
    assert torch.equal(together.distance[:1], apart.distance[:1])
    assert not torch.equal(together.distance[1:], apart.distance[1:])


def test_inputs_stay_as_they_were_and_compiled_equals_eager(case: Case):
    strategy, memory, at = case
    seen = at(0.05)
    before = [x.clone() for x in (*memory, seen)]
    eager = strategy(memory, seen, threshold=THRESHOLDS)
    compiled = torch.compile(strategy, backend="aot_eager", fullgraph=True)(memory, seen, threshold=THRESHOLDS)
    assert all(torch.equal(x, y) for x, y in zip(before, (*memory, seen), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(eager, compiled, strict=True))


def test_taylor_forecasts_by_its_row_as_soon_as_one_residual_is_known():
    row = torch.tensor([[1.5, 1.0], [-0.5, 0.0]])
    proposal = taylor(MEMORY._replace(num_nodes=torch.tensor([2, 0])), row)
    expected = 1.5 * MEMORY.history[0, 0] - 0.5 * MEMORY.history[1, 0]
    torch.testing.assert_close(proposal.residual[0], expected)
    assert torch.equal(proposal.residual[1], MEMORY.history[0, 1])
    assert proposal.is_valid.tolist() == [True, False]
    assert proposal.distance.isnan().all()


def test_taylor_is_pure_compiles_and_keeps_samples_apart():
    row = torch.tensor([[1.5, 1.2], [-0.5, -0.2]])
    before = [x.clone() for x in (*MEMORY, row)]
    eager = taylor(MEMORY, row)
    compiled = torch.compile(taylor, backend="aot_eager", fullgraph=True)(MEMORY, row)
    assert all(torch.equal(x, y) for x, y in zip(before, (*MEMORY, row), strict=True))
    assert torch.equal(eager.residual, compiled.residual)
    noisy = MEMORY.history.clone()
    noisy[:, 1] = 7.0
    assert torch.equal(taylor(MEMORY._replace(history=noisy), row).residual[0], eager.residual[0])


TOKENS = torch.arange(BATCH * SEQ * DIM, dtype=torch.float32).reshape(BATCH, SEQ, DIM)
RESIDUAL = torch.full_like(TOKENS, 0.5)


def carry_out(tokens: Tensor, is_computed: Tensor, is_partial: Tensor, ran: Callable[[str], None] = lambda _: None):
    def compute() -> tuple[Tensor, Tensor]:
        ran("computed")
        return tokens * 2, MEMORY.attention + 1

    def recompute_mlps() -> Tensor:
        ran("partial")
        return tokens * 3

    return carry_out_decided(
        Decided(is_computed, is_partial),
        tokens + RESIDUAL,
        MEMORY.attention,
        compute=compute,
        recompute_mlps=recompute_mlps,
    )


FLAGS = [(c, p) for c in range(4) for p in range(4) if not c & p]


@pytest.mark.parametrize(("computed", "partial"), FLAGS)
def test_carry_out_gives_each_sample_its_own_result(computed: int, partial: int):
    is_computed, is_partial = (torch.tensor([bool(n & 1), bool(n & 2)]) for n in (computed, partial))
    ran: list[str] = []
    after, outputs = carry_out(TOKENS, is_computed, is_partial, ran.append)
    for sample in range(BATCH):
        factor = 2 if is_computed[sample] else 3
        reuses = not (is_computed[sample] or is_partial[sample])
        assert torch.equal(after[sample], TOKENS[sample] + RESIDUAL[sample] if reuses else TOKENS[sample] * factor)
        assert torch.equal(outputs[:, sample], MEMORY.attention[:, sample] + int(is_computed[sample]))
    assert ran == [name for name, flags in (("partial", is_partial), ("computed", is_computed)) if flags.any()]


def test_carry_out_compiles_to_one_graph_with_branches_of_the_same_kind():
    compiled = torch.compile(carry_out, backend="aot_eager", fullgraph=True)
    metadata = []
    for computed, partial in FLAGS:
        is_computed, is_partial = (torch.tensor([bool(n & 1), bool(n & 2)]) for n in (computed, partial))
        eager, traced = carry_out(TOKENS, is_computed, is_partial), compiled(TOKENS, is_computed, is_partial)
        assert all(torch.equal(x, y) for x, y in zip(eager, traced, strict=True))
        metadata.append([(x.shape, x.dtype, x.stride()) for x in (*eager, *traced)])
    assert metadata.count(metadata[0]) == len(metadata)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
