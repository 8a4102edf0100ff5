"""What error control will decide at later steps: it is known once the last refresh has measured its error."""

import itertools

import torch
from torch import Tensor

from afcache._typing import PerSample, typed
from afcache.functional import error_control
from afcache.functional.decision import predict_error, would_exceed
from afcache.functional.state import CacheState, StepSchedule
from afcache.settings.config import CacheConfig


@typed
def foresee(
    state: CacheState,
    others: tuple[CacheState, ...],
    schedule: StepSchedule,
    weight: PerSample,
    others_weight: PerSample,
    *,
    config: CacheConfig,
) -> Tensor:
    """Whether each sample would refresh at each of several steps, if all steps before it were forecast.

    A forecast measures nothing, so that until the next refresh the estimate depends on the schedule alone:

        accumulated_i = accumulated + sum_{j <= i} (w e_j + w' sum_others e_j) |sigma_{j+1} - sigma_j|

    Args:
        state: what the leading guidance branch remembers.
        others: what the other branches remember.
        schedule: of the steps, the next one first; every field has a leading axis of steps.
        weight: w, of the leading branch's predicted error.
        others_weight: w', of the others'.
        config: settings of policy "adaptive"; static.

    Returns:
        bool `[steps, batch]`; rows after a sample's first refresh say nothing of it.

    """

    def contribution(step: StepSchedule) -> Tensor:
        error = weight * predict_error(state, step, config=config)
        for other in others:
            error = error + others_weight * predict_error(other, step, config=config)
        return error_control.contribution(error, step.sigma, step.sigma_next)

    # One addition a step, in the order of the steps: the sums that the steps themselves will make.
    contributions = torch.vmap(contribution)(schedule).unbind()
    _, *sums = itertools.accumulate(contributions, initial=state.accumulated_error)
    accumulated = torch.stack(sums)
    refresh = torch.vmap(lambda step, error: would_exceed(state, step, error, config=config))(schedule, accumulated)
    if config.batch_decisions == "shared":
        refresh = refresh.any(dim=1, keepdim=True).expand_as(refresh)
    return refresh
