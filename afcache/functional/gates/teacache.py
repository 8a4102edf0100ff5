"""TeaCache's gate: the change of the first block's modulated input from step to step, rescaled and accumulated.

Reference:
    Liu et al., 2024, TeaCache, arXiv 2411.19108, equation 6.
"""

import torch

from afcache._typing import Features, PerSample, Tokens, typed
from afcache.functional.model import Embedded, Model, parts_of
from afcache.functional.state import GateState

# The authors' fit for their first model, highest power first. It never falls under 0.18, so that a threshold of 0.6 caches 3
# steps in a row at most, whatever the steps' number.
TEACACHE_POLYNOMIAL = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)


@typed
def modulated_input(model: Model, embedded: Embedded, start: Tokens) -> Features:
    """Image tokens as the first block's attention would see them; float32."""
    del start
    observed = parts_of(model).observe(model.transformer, embedded.hidden_states, embedded.temb)
    return observed.to(torch.float32)


@typed
def accumulate(state: GateState, distance: PerSample) -> PerSample:
    """The sum of polynomial(d) since the last refresh, this step's included."""
    rescaled = torch.zeros_like(distance)
    for coefficient in TEACACHE_POLYNOMIAL:
        rescaled = rescaled * distance + coefficient
    return state.accumulated + rescaled
