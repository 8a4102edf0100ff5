"""A step whose velocity somebody else has computed: the model's own forward, run as its owner runs it."""

from typing import Any, NamedTuple

from torch import Tensor

from afcache._typing import Latents, Velocity
from afcache.functional.model import Architecture, Model, Sizes, scaled_dot_product_attention


class Given(NamedTuple):
    """A call of a model that is not ours to run.

    Attributes:
        latents: x.
        velocity: v at x, of each of the call's branches, where the step is one that computes; else without meaning.

    """

    latents: Latents
    velocity: Velocity


def _velocities(model: Model, inputs: tuple[Given, ...]) -> tuple[Tensor, ...]:
    del model
    return tuple(each.velocity for each in inputs)


def _latents(inputs: Given) -> Tensor:
    return inputs.latents


def _split(inputs: Given, count: int) -> tuple[Given, ...]:
    """Branches that share a call are at the same latents; their velocities are one after the other in the batch."""
    latents, velocity = inputs
    is_computed = velocity.shape[0] == count * latents.shape[0]
    velocities = velocity.chunk(count) if is_computed else (velocity,) * count
    # Copies: torch.cond takes no two inputs that share their memory.
    return tuple(Given(latents.clone(), each.clone()) for each in velocities)


def _closed(*_: Any) -> Any:
    raise AssertionError("nothing is known of a model whose velocity is given")


# Of a model of which nothing is known but what it returns.
GIVEN = Architecture(
    sizes=_closed,
    embed=_closed,
    stack=_closed,
    head=_closed,
    place=_closed,
    latents=_latents,
    forward=_velocities,
    split=_split,
)


def given_model(sizes: Sizes) -> Model:
    """A model that returns what it is given.

    Args:
        sizes: of the model that computes.

    """
    return Model(None, GIVEN, scaled_dot_product_attention, sizes)
