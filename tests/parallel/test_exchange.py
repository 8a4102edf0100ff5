"""Whose sums a rank joins, and with what: where one were left out, ranks would branch apart and wait for each other."""

import pytest
import torch
from torch import Tensor

from afcache.functional.model import Lengths
from afcache.functional.ranks import step
from afcache.functional.ranks.attention import SequenceRanks
from afcache.functional.ranks.collectives import Ranks

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
