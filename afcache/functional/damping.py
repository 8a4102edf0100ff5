"""How far a forecast should follow its extrapolation: measured at every refresh, for free.

z_n is what the last refresh kept, D where the undamped forecast leads from it. At the next refresh, z is known, and with it
which damped forecast z_n + (1 - delta) D would have been nearest:

    delta = 1 - <z - z_n, D> / <D, D>

Along a smooth path delta is near 0; where what is kept wanders, as in videos, half of an extrapolation is noise. One refresh
says so roughly, and damping where nothing is to be damped costs more than the reverse: 0.6 of what was found, within 0 and 1,
are believed. The mean of that and of what was used damps the steps until the refresh after it.
"""

import torch

from afcache._typing import PerSample, typed
from afcache.functional import forecast
from afcache.functional.decision import damping_of, undamped_row
from afcache.functional.distance import Reduction, no_reduction
from afcache.functional.state import StepSchedule
from afcache.functional.update import Computed, Prepared
from afcache.settings.config import CacheConfig

# Relative square of an extrapolation that float32 cannot tell from none.
_ROUNDING = 1e-12
# Of what one refresh finds: a larger share gains videos more, and images less.
_BELIEVED = 0.6


@typed
def learn_damping(
    prepared: Prepared,
    computed: Computed,
    schedule: StepSchedule,
    *,
    config: CacheConfig,
    reduction: Reduction = no_reduction,
) -> PerSample:
    """The damping of the steps after a refresh; as it was where there was nothing to extrapolate.

    Args:
        prepared: the branch before the refresh; its state has a damping.
        computed: the branch computed.
        schedule: where the step stands.
        config: settings; static.
        reduction: sums over the ranks that share the tokens.
    Cost:
        two passes over the history, at refreshes alone.

    """
    state = prepared.state
    assert state.damping is not None
    reused = state.history[0].to(torch.float32)
    step = forecast.apply_row(undamped_row(state, schedule, config=config), state.history).to(torch.float32) - reused
    moved = computed.kept.to(torch.float32) - reused
    pairs = (moved, step), (step, step), (reused, reused)
    along, length, size = reduction(torch.stack([(x * y).flatten(1).sum(1) for x, y in pairs])).unbind()
    found = (_BELIEVED * (1 - along / length)).clamp(0.0, 1.0)
    learnt = (damping_of(state, schedule) + found) / 2
    is_found = (state.num_nodes > 1) & (length > _ROUNDING * size) & torch.isfinite(found)
    return torch.where(is_found, learnt, state.damping)
