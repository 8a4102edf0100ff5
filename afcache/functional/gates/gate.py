"""Gates: policies that decide by what a step's input looks like.

Statistics are float32 and per sample (the authors' are in the model's dtype, over the whole batch), NaN means refresh, and
guidance branches follow the decision of the first (the authors count calls).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from afcache._typing import Features, Flags, Forced, PerSample, Tokens, typed
from afcache.functional.distance import relative_l1
from afcache.functional.gates.first_blocks import added_by_first_blocks, distance_itself
from afcache.functional.gates.teacache import accumulate, modulated_input
from afcache.functional.model import Embedded, Model
from afcache.functional.rounding import above_floor
from afcache.functional.state import GateState
from afcache.settings.config import CacheConfig


class Gate(NamedTuple):
    """A policy that sees each step.

    Attributes:
        features: `(model, embedded, start) -> float32 [batch, img_seq, dim]`: what it compares.
        statistic: `(state, distance) -> [batch]`: what meets the threshold.
        looks_back_to_refresh: whether it compares with the last refresh; if not, with the step before.

    """

    features: Callable[[Model, Embedded, Tokens], Features]
    statistic: Callable[[GateState, PerSample], PerSample]
    looks_back_to_refresh: bool


GATES = {
    "teacache": Gate(modulated_input, accumulate, looks_back_to_refresh=False),
    "dbcache": Gate(added_by_first_blocks, distance_itself, looks_back_to_refresh=True),
}


class Observation(NamedTuple):
    """What a gate sees of a step.

    Attributes:
        features: what it compares.
        change: its statistic, which meets the threshold; NaN where nothing is known.

    """

    features: Features
    change: PerSample


@typed
def observe(
    model: Model, state: GateState | None, embedded: Embedded, start: Tokens, *, config: CacheConfig
) -> Observation | None:
    """Look at a step through the policy's gate, if it has one.

    d = sum |features - reference| / sum |reference|;  change = statistic(d)

    A `noise_floor` that the settings name is taken off d.

    Args:
        model: the transformer.
        state: of the gate.
        embedded: image tokens and conditioning.
        start: what the cached blocks start from.
        config: settings; static.

    """
    if state is None:
        return None
    gate = GATES[config.policy]
    features = gate.features(model, embedded, start)
    distance = relative_l1(features, state.reference, reduction=model.exchange.of_leader)
    if config.noise_floor:
        distance = above_floor(distance, torch.full((), config.noise_floor, device=distance.device))
    return Observation(features, gate.statistic(state, distance))


@typed
def is_changed(state: GateState, change: PerSample, is_forced: Forced, *, config: CacheConfig) -> Flags:
    """Refresh unless the change stays under the threshold; NaN and a threshold of 0 refresh."""
    refresh = ~(change < config.threshold) | is_forced
    if config.max_cached_steps is not None:
        refresh = refresh | (state.num_cached >= config.max_cached_steps)
    return refresh


@typed
def remember(
    state: GateState | None, observation: Observation | None, refresh: Flags, *, config: CacheConfig
) -> GateState | None:
    """The gate after the step; None without one."""
    if state is None or observation is None:
        return None
    zeros = torch.zeros_like(observation.change)
    is_reference = refresh if GATES[config.policy].looks_back_to_refresh else torch.ones_like(refresh)
    return GateState(
        reference=torch.where(is_reference[:, None, None], observation.features, state.reference),
        accumulated=torch.where(refresh, zeros, observation.change),
        num_cached=torch.where(refresh, torch.zeros_like(state.num_cached), state.num_cached + 1),
    )
