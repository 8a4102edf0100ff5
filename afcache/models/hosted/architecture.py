"""A transformer that runs its own forward, as an `Architecture`: the whole of it is one side of the step's branch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afcache._typing import HostModule
from afcache.functional.model import Architecture, Model, Sizes
from afcache.models.hosted.conventions import Conventions, given_sample, with_sample
from afcache.models.hosted.pace import Pace, enter, leave
from afcache.models.hosted.samples import Argument, Cuts, cut_output, fill_output, place_sample, read_sample


class HostInputs(NamedTuple):
    """A call of a transformer.

    Attributes:
        arguments: of its forward, by name.
        cuts: where in its argument the sample is.
        sign: 1 where the output is the velocity, -1 where pipelines turn it round.
        part, parts: which of the guidance branches that share the call, in the order of its batch.
        pace: of what is drawn beside the sample on a schedule of its own; None where nothing is.

    """

    arguments: dict[str, Any]
    cuts: Cuts = ()
    sign: int = 1
    part: int = 0
    parts: int = 1
    pace: Pace | None = None


def latents_of(conventions: Conventions, inputs: HostInputs) -> Tensor:
    """The sample, `[batch, *latent]`."""
    given = given_sample(conventions, inputs.arguments)
    if inputs.pace is not None:
        given = (given[0], inputs.pace.scale * given[1])
    return read_sample(given, inputs.cuts)


def velocity_of(conventions: Conventions, inputs: HostInputs, result: Any) -> Tensor:
    """The velocity of the sample in what a forward returned; it may be a view."""
    output, sign = conventions.output(result), inputs.sign
    if inputs.pace is not None:
        output = (output[0], sign * enter(inputs.pace, sign * output[1], given_sample(conventions, inputs.arguments)[1]))
    return sign * cut_output(output, inputs.cuts)


def output_of(conventions: Conventions, inputs: HostInputs, velocity: Tensor, given: Argument) -> Any:
    """What the pipeline expects, by the velocity of the sample that it gave: the inverse of `velocity_of`."""
    sign = inputs.sign
    output = fill_output(sign * velocity, given, inputs.cuts)
    if inputs.pace is not None:
        output = (output[0], sign * leave(inputs.pace, sign * output[1], given[1]))
    return output


def hosted_architecture(conventions: Conventions, forward: Callable[..., Any]) -> Architecture:
    """The architecture of a transformer of which only its forward is known.

    Args:
        conventions: how its pipelines call it.
        forward: of its class.

    """

    def latents(inputs: HostInputs) -> Tensor:
        whole = latents_of(conventions, inputs)
        # A copy: torch.cond takes no two inputs that share their memory.
        return whole if inputs.parts == 1 else whole.chunk(inputs.parts)[inputs.part].clone()

    def velocities(model: Model, inputs: tuple[HostInputs, ...]) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for call in inputs:
            # The first of those that share a call makes it.
            if call.part == 0:
                result = forward(model.transformer, **call.arguments, return_dict=False)
                velocity = velocity_of(conventions, call, result)
                found += [_own(part, latents(call)) for part in velocity.chunk(call.parts)]
        return tuple(found)

    def place(inputs: HostInputs, x: Tensor, sigma: Tensor) -> HostInputs:
        given = given_sample(conventions, inputs.arguments)
        placed = place_sample(given, torch.cat([x] * inputs.parts), inputs.cuts)
        timestep = inputs.arguments[conventions.time]
        moved = conventions.clock.show(sigma).to(timestep.dtype).expand(timestep.shape).clone()
        arguments = with_sample(conventions, inputs.arguments, placed)
        return inputs._replace(arguments={**arguments, conventions.time: moved})

    def split(inputs: HostInputs, count: int) -> tuple[HostInputs, ...]:
        return tuple(inputs._replace(part=part, parts=count) for part in range(count))

    return Architecture(
        sizes=_sizes,
        embed=_closed,
        stack=_closed,
        head=_closed,
        place=place,
        latents=latents,
        forward=velocities,
        split=split,
    )


def _own(velocity: Tensor, like: Tensor) -> Tensor:
    """In memory of its own, contiguous: both sides of torch.cond are alike, and neither is a view."""
    return velocity.reshape(like.shape).clone(memory_format=torch.contiguous_format)


def _closed(*_: Any) -> Any:
    raise AssertionError("nothing is known of the inside of a model that runs its own forward")


def _sizes(transformer: HostModule) -> Sizes:
    """Blocks are counted; widths matter to those alone who look inside."""
    kinds = set(getattr(transformer, "_repeated_blocks", None) or ())
    blocks = sum(type(module).__name__ in kinds for module in transformer.modules())
    return Sizes(num_blocks=max(blocks, 1), dim=0, heads=0, channels=0)
