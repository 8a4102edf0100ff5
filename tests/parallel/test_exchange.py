"""Whose sums a rank joins, and with what: where one were left out, ranks would branch apart and wait for each other."""

from typing import Any

import pytest
import torch
from torch import Tensor

from afcache.functional.model import Lengths
from afcache.functional.ranks import step
from afcache.functional.ranks.attention import SequenceRanks
from afcache.functional.ranks.collectives import Ranks
from afcache.functional.ranks.exchange import ALONE

SUMS = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


@pytest.mark.parametrize("branch", [0, 1])
def test_sums_are_joined_with_the_ranks_that_they_are_over(monkeypatch: pytest.MonkeyPatch, branch: int):
    """The second of two ranks of a sequence, of either of two guidance branches."""
    given: dict[str, Tensor] = {}

    def all_sum(x: Tensor, ranks: Ranks) -> Tensor:
        given[ranks.name] = x
        return 10 * x

    monkeypatch.setattr(step, "all_sum", all_sum)
    pair = Ranks("sequence", 1, 2)
    layout = step.Layout(SequenceRanks(whole=pair, ulysses=pair), Ranks("branches", branch, 2), Ranks("all", 2 * branch + 1, 4))
    exchange = step.exchange_of(layout, Lengths(4, 8))
    assert exchange.shards == 2
    assert torch.equal(exchange.over_tokens(SUMS), 10 * SUMS)
    assert torch.equal(given["sequence"], SUMS)
    assert torch.equal(exchange.over_branches(SUMS), 10 * SUMS)
    assert torch.equal(given["branches"], SUMS)
    # What the leading branch says counts once for each of its ranks, and what others say does not.
    said = SUMS if branch == 0 else torch.zeros_like(SUMS)
    assert torch.equal(exchange.of_leader(SUMS), 10 * said)
    assert torch.equal(given["all"], said)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_over_everything_is_the_first_ranks(monkeypatch: pytest.MonkeyPatch, rank: int):
    given: list[Tensor] = []
    monkeypatch.setattr(step, "all_sum", lambda x, ranks: given.append(x) or SUMS[1])
    layout = step.Layout(SequenceRanks(whole=Ranks("sequence", rank, 2)), replica=Ranks("all", rank, 2))
    exchange = step.exchange_of_wholes(layout)
    assert torch.equal(exchange.adopt_error(SUMS[0]), SUMS[1])
    assert torch.equal(given[0], SUMS[0] if rank == 0 else torch.zeros(2))
    # Nothing else is told.
    assert exchange._replace(adopt_error=ALONE.adopt_error, agree=ALONE.agree) == ALONE
    codes, votes = exchange.agree(torch.ones(2, dtype=torch.int64))
    assert votes is None
    assert codes.tolist() == [1, 1]


def test_a_rank_alone_shares_out_nothing():
    model: Any = object()
    assert step.share_forward(model, step.Layout()) is model
