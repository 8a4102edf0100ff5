"""How much of a model's velocity is rounding: measured on the model itself, by five small evaluations."""

from typing import Any

import torch

from afcache.functional.model import model_of
from afcache.functional.outputs import full_forward
from afcache.functional.rounding import computational_noise
from afcache.models.family import Family

# Between the points of the difference table, relative to the latents: far enough for activations in int8 to round anew,
# near enough for the fourth difference of the smooth part to vanish.
_DISTANCE = 1 / 32
_ORDER = 4


@torch.no_grad()
def measure_noise_floor(transformer: Any, family: Family, *, dtype: torch.dtype, device: torch.device | str) -> float:
    """The relative difference that rounding alone makes between two evaluations, sqrt(2) times the noise of one.

    The inputs are always the same, so that the result depends on the weights alone and every image decides alike. They lie
    at sigma 1, where relative noise is smallest: later steps have more, and a floor that is too low only costs refreshes.

    Args:
        transformer: the host's, with its present weights.
        family: its family.
        dtype, device: of the latents.
    Cost:
        five evaluations with 80 tokens, eagerly.

    """
    assert family.calls.probe is not None
    inputs = family.calls.probe(transformer, dtype=dtype, device=device)
    model = model_of(transformer, family.architecture, family.attention_kernel(transformer))
    direction = torch.randn(inputs.hidden_states.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    velocities = []
    for index in range(_ORDER + 1):
        moved = inputs.hidden_states + (index - _ORDER // 2) * _DISTANCE * direction
        velocities.append(full_forward(model, inputs._replace(hidden_states=moved)))
    return 2**0.5 * float(computational_noise(velocities))
