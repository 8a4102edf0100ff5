"""How the pipelines of a family call its transformer: all that is said of one whose forward stays its own."""

from collections.abc import Callable
from typing import Any, NamedTuple

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from afcache._typing import HostModule
from afcache.models.family import IN_SIGMA, Clock, always
from afcache.models.hosted.samples import Argument, Cuts


def _no_cuts(transformer: HostModule, arguments: dict[str, Any]) -> Cuts:
    del transformer, arguments
    return ()


def _first(result: Any) -> Any:
    return result if isinstance(result, Tensor) else result[0]


def _as_given(arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments


def given_sample(conventions: "Conventions", arguments: dict[str, Any]) -> Argument:
    """What the sample comes in."""
    first = arguments[conventions.argument]
    return (first, arguments[conventions.beside]) if conventions.beside else first


def with_sample(conventions: "Conventions", arguments: dict[str, Any], argument: Argument) -> dict[str, Any]:
    """The arguments with another one for the sample."""
    if not conventions.beside:
        return {**arguments, conventions.argument: argument}
    return {**arguments, conventions.argument: argument[0], conventions.beside: argument[1]}


class Conventions(NamedTuple):
    """What the pipelines of a family have in common.

    Attributes:
        argument: of the transformer's forward, in which the sample comes: a tensor, or a list with an entry for each image.
        beside: another one, of what is drawn together with it: audio beside video.
        schedule: the pipelines' scheduler of that, where it has one of its own (`afcache.models.hosted.pace`); "" shares one.
        cuts: `(transformer, arguments) -> Cuts`: where in it; may wait for the device.
        depends: the argument that leaves the cuts as they were while it is the very same tensor; "" asks at every call.
        time: the argument that holds the timestep.
        moment: `(arguments) -> Tensor`: the sample's own timestep, where that argument holds others, too.
        arrange: `(arguments) -> arguments`: in the same shapes at every step, where pipelines' differ; the output is the same.
        clock: what that counts.
        sign: 1 where the output is the velocity, -1 where pipelines turn it round.
        shares: whether guidance branches may share a call, one after the other in the batch.
        prompt_first: whether the prompt's is the first of those that share one.
        varying: arguments that differ at every step, beside the sample and those whose name begins with "timestep".
        writes_latents: whether pipelines write the next latents into those that they gave, which we must keep a copy of.
        wrap: the class of what the forward returns if asked for more than a tuple.
        output: what of the forward's result holds the velocity.
        prime: `(transformer)`: what must have happened once before the forward can be traced.
        passes: `(arguments) -> bool`: calls that are no step of a trajectory, as those that fill a cache of keys and values.
        traces: `(transformer) -> bool`: whether the whole forward can be one side of a branch; else computed steps are the
            model's own forward, called.
        is_flow: whether the output is a velocity; else noise or v, as the scheduler says. None: nobody knows.

    """

    argument: str = "hidden_states"
    beside: str = ""
    schedule: str = ""
    cuts: Callable[[HostModule, dict[str, Any]], Cuts] = _no_cuts
    depends: str = ""
    time: str = "timestep"
    moment: Callable[[dict[str, Any]], Tensor] | None = None
    arrange: Callable[[dict[str, Any]], dict[str, Any]] = _as_given
    clock: Clock = IN_SIGMA
    sign: int = 1
    shares: bool = False
    prompt_first: bool = False
    varying: tuple[str, ...] = ()
    writes_latents: bool = False
    wrap: Callable[..., Any] = Transformer2DModelOutput
    output: Callable[[Any], Any] = _first
    prime: Callable[[HostModule], None] | None = None
    passes: Callable[[dict[str, Any]], bool] | None = None
    traces: Callable[[HostModule], bool] = always
    is_flow: bool | None = True


# The latents themselves, packed or not; the noise level; one call for each guidance branch.
USUAL = Conventions()
