"""Gates: policies that decide by what a step's input looks like, after TeaCache and FBCache / DBCache.

Statistics are float32 and per sample (the authors' are in the model's dtype, over the whole batch), NaN means refresh, and
guidance branches follow the decision of the first (the authors count calls).
"""

import torch

from afcache._typing import Features, Flag, Flags, HostModule, PerSample, Tokens, typed
from afcache.functional.distance import Reduction, no_reduction, relative_l1
from afcache.functional.model import Architecture, Embedded
from afcache.functional.rounding import above_floor
from afcache.functional.state import GateState
from afcache.settings.config import CacheConfig

# The authors' fit for FLUX.1, highest power first. It never falls under 0.18, so that a threshold of 0.6 caches 3 steps in a
# row at most, whatever the steps' number.
TEACACHE_POLYNOMIAL = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)


@typed
def observe(
    transformer: HostModule, embedded: Embedded, start: Tokens, *, architecture: Architecture, config: CacheConfig
) -> Features:
    """What the gate compares: the first block's modulated input, or what the first blocks added to the image tokens.

    Args:
        transformer: owner of the weights.
        embedded: image tokens and conditioning.
        start: what the cached blocks start from.
        architecture: the model's parts.
        config: settings; static.

    Returns:
        float32, fresh.

    """
    if config.policy == "teacache":
        assert architecture.parts is not None
        return architecture.parts.observe(transformer, embedded.hidden_states, embedded.temb).to(torch.float32)
    image = start[:, start.shape[1] - embedded.hidden_states.shape[1] :]
    return image.to(torch.float32) - embedded.hidden_states.to(torch.float32)


@typed
def change(gate: GateState, seen: Features, *, config: CacheConfig, reduction: Reduction = no_reduction) -> PerSample:
    """The statistic that meets the threshold; NaN where nothing is known.

    d = mean |seen - reference| / mean |reference|;  "dbcache": d;  "teacache": the sum of polynomial(d) since the last refresh

    A `noise_floor` that the settings name is taken off d.

    Reference:
        Liu et al., 2024, TeaCache, arXiv 2411.19108, equation 6; FBCache and DBCache compare d itself.
    """
    distance = relative_l1(seen, gate.reference, reduction=reduction)
    if config.noise_floor:
        distance = above_floor(distance, torch.full((), config.noise_floor, device=distance.device))
    if config.policy == "dbcache":
        return distance
    rescaled = torch.zeros_like(distance)
    for coefficient in TEACACHE_POLYNOMIAL:
        rescaled = rescaled * distance + coefficient
    return gate.accumulated + rescaled


@typed
def is_changed(gate: GateState, changed: PerSample, is_forced: Flag, *, config: CacheConfig) -> Flags:
    """Refresh unless the change stays under the threshold; NaN and a threshold of 0 refresh."""
    refresh = ~(changed < config.threshold) | is_forced
    if config.max_cached_steps is not None:
        refresh = refresh | (gate.num_cached >= config.max_cached_steps)
    return refresh


@typed
def remember(gate: GateState, seen: Features, changed: PerSample, refresh: Flags, *, config: CacheConfig) -> GateState:
    """The gate after the step: "teacache" compares with the step before, "dbcache" with the last refresh."""
    zeros = torch.zeros_like(changed)
    is_reference = refresh if config.policy == "dbcache" else torch.ones_like(refresh)
    return GateState(
        reference=torch.where(is_reference[:, None, None], seen, gate.reference),
        accumulated=torch.where(refresh, zeros, changed),
        num_cached=torch.where(refresh, torch.zeros_like(gate.num_cached), gate.num_cached + 1),
    )
