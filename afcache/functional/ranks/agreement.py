"""Ranks that take a step together refresh the same samples."""

import torch

from afcache.functional.decision import Decision
from afcache.functional.ranks.exchange import Exchange


def agree(decision: Decision, exchange: Exchange) -> Decision:
    """The decision, and every rank's under the debug option: a sample that any rank would refresh is refreshed on all."""
    codes, votes = exchange.agree((~decision.refresh).to(torch.int64))
    return decision if votes is None else decision._replace(refresh=codes == 0, votes=votes)
