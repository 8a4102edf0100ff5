"""The gate of FBCache and DBCache: how much what the first blocks add has changed since the last refresh.

Reference:
    First-block caches, ParaAttention's FBCache and cache-dit's DBCache; both compare the relative L1 distance itself.
"""

import torch

from afcache._typing import Features, PerSample, Tokens, typed
from afcache.functional.model import Embedded, Model
from afcache.functional.state import GateState


@typed
def added_by_first_blocks(model: Model, embedded: Embedded, start: Tokens) -> Features:
    """What the first blocks added to the image tokens, which come last; float32."""
    del model
    image = start[:, start.shape[1] - embedded.hidden_states.shape[1] :]
    return image.to(torch.float32) - embedded.hidden_states.to(torch.float32)


@typed
def distance_itself(state: GateState, distance: PerSample) -> PerSample:
    """The change since the last refresh, as it is."""
    del state
    return distance
