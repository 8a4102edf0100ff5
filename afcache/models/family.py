"""What the host side must know of a family of models: how its pipelines call it, and what we refuse to cache."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afcache._typing import Flag, HostModule, Latents
from afcache.functional.model import Architecture, AttentionKernel
from afcache.functional.state import StepSchedule
from afcache.settings.config import Target


class Clock(NamedTuple):
    """What the timestep argument of a transformer counts: the scheduler's timesteps are offset + scale * argument.

    Attributes:
        scale: 1000 where it is the noise level, 1 where it is the scheduler's timestep, -1000 where it counts from the end.
        offset: of the scheduler's timesteps.

    """

    scale: float = 1000.0
    offset: float = 0.0

    def read(self, timestep: Tensor) -> Tensor:
        """The scheduler's timestep, float32 `[batch]`; where tokens have some of their own, the noisiest."""
        values = self.offset + self.scale * timestep.to(torch.float32)
        return values.flatten(1).amax(1) if values.ndim > 1 else values.reshape(-1)

    def show(self, sigma: Tensor) -> Tensor:
        """The argument at a noise level."""
        return (1000 * sigma - self.offset) / self.scale

    def rounding(self, timestep: Tensor) -> float:
        """How far the argument's dtype may have moved the scheduler's timestep; integers are cut off. Waits for the device."""
        if not timestep.is_floating_point():
            return abs(self.scale)
        return 2 * torch.finfo(timestep.dtype).eps * abs(self.scale) * float(timestep.abs().max())


# What transformers are known to count: the scheduler's timesteps, the noise level, or that from the end.
IN_TIMESTEPS, IN_SIGMA, FROM_THE_END = Clock(scale=1.0), Clock(scale=1000.0), Clock(scale=-1000.0, offset=1000.0)
CLOCKS = (IN_TIMESTEPS, IN_SIGMA, FROM_THE_END)


class Call(NamedTuple):
    """One call of the transformer, as the runtime reads it.

    Attributes:
        inputs: what the architecture's `embed` takes.
        latents: of the sample, `[batch, img_seq, ...]`; what the scheduler steps.
        source: the tensor that they came in; guidance branches of a step are mostly given the same one.
        timestep: as the pipeline gave it.
        prefix_length: tokens that the blocks see before the image's.
        conditions: what pipelines hand over unchanged from step to step.
        is_controlled: whether a ControlNet says anything, bool, 0-d; None without one.
        structure: shapes of all inputs; calls of another structure are other code.
        branches: how many guidance branches share the call, one after the other in its batch; `latents` are those of one.
        again: `() -> Call`: the same call, of which nothing is taken over from earlier ones: an image begins with it. None
            where nothing ever is.
        ask: `(forward) -> velocity [batch, img_seq, ...]` by the host's own forward; None where inputs were made by hand.
        placed: `(sigmas of the sample, of what is beside it, index of the step) -> Call`: the same call, of which all is on the
            sample's schedule; None where there is no other.

    """

    inputs: Any
    latents: Latents
    source: Tensor
    timestep: Tensor
    prefix_length: int
    conditions: tuple[Tensor, ...]
    is_controlled: Flag | None
    structure: Any
    branches: int = 1
    ask: Callable[[Callable[..., Any]], Tensor] | None = None
    again: "Callable[[], Call] | None" = None
    placed: "Callable[[Tensor, Tensor, int], Call] | None" = None


class Calls(NamedTuple):
    """How pipelines call the transformer.

    Attributes:
        reader: `(transformer) -> reader`: keeps what is read once of several calls.
        answer: `(transformer, reader, forward, *args, **kwargs)`: the host's forward by ours, which maps a `Call` to a
            velocity.
        clock: what their timestep counts; None where that is to be found out.
        probe: `(transformer, dtype=, device=) -> inputs` of a small sample, always the same; None where nobody knows one.
        of_ranks: asked for by ranks that draw together; None where a family's cannot.
        prompt_first: whether, of guidance branches that share a call, the prompt's is the first.
        confirm: `(reader, latents before and after a step, its schedule, outputs) -> bool`: of a family that nobody described,
            whether its outputs have to be turned round; raises where they are no velocities. None for all others.
        passes: `(reader, args, kwargs) -> bool`: calls that are no step of a trajectory, and run the model's own forward.
        beside: the pipelines' scheduler of what is drawn beside the sample on a schedule of its own; "" where none is.

    """

    reader: Callable[[HostModule], Any]
    answer: Callable[..., Any]
    clock: Clock | None
    probe: Callable[..., Any] | None = None
    of_ranks: "CallsOfRanks | None" = None
    prompt_first: bool = True
    confirm: Callable[[Any, Tensor, Tensor, StepSchedule, list[Tensor]], bool] | None = None
    passes: Callable[[Any, tuple[Any, ...], dict[str, Any]], bool] | None = None
    beside: str = ""


class CallsOfRanks(NamedTuple):
    """What ranks that draw together ask of calls.

    Attributes:
        read: `(inputs) -> Call` of inputs that are made of a call's.
        of_branches: fields of the inputs in which guidance branches differ.
        describe: `(inputs, is_later=) -> {name: value}`: what all ranks of an image must be given alike.

    """

    read: Callable[[Any], Call]
    of_branches: tuple[str, ...]
    describe: Callable[..., dict[str, Any]]


class Checks(NamedTuple):
    """What raises where our forward would not compute what the host does.

    Attributes:
        transformer: `(transformer)`: another class, or attention processors that we do not know.
        cache: `(transformer)`: a cache of the host's is on.
        blocks: `(transformer)`: something is attached to a module whose forward ours replaces.
        config: `(transformer, config)`: settings that do not fit the number of blocks.
        call: `(reader, config, shares_sequence=)`: a call that the settings, or ranks that share a sequence, cannot take.
        inputs: `(name, inputs, transformer, config)`: inputs that somebody made by hand, and that do not fit.

    """

    transformer: Callable[[Any], None]
    cache: Callable[[HostModule], None]
    blocks: Callable[[HostModule], None]
    config: Callable[..., None]
    call: Callable[..., None]
    inputs: Callable[..., None]


class Requests(NamedTuple):
    """How requests of several callers become trajectories of one batch, and their latents images.

    Attributes:
        pipelines: names of the classes that do nothing between steps but step.
        read: `(arguments of a call of the transformer) -> inputs`; raises NotImplementedError where they hold what a batch of
            requests cannot have.
        deliver: `(pipe, inputs, latents, output_type) -> image` of one request.

    """

    pipelines: tuple[str, ...]
    read: Callable[[dict[str, Any]], Any]
    deliver: Callable[[Any, Any, Tensor, str], Any]


def always(_: HostModule) -> bool:
    """Whatever the transformer."""
    return True


class Family(NamedTuple):
    """A family of models.

    Attributes:
        name: as users call it.
        architecture: the parts of the model.
        calls: how pipelines call it.
        checks: what is refused.
        attention_backend: `(transformer) -> name` of the host's attention kernel; None: torch's own.
        attention_kernel: `(transformer) -> AttentionKernel` of that name.
        target: what is forecast where nobody asks for anything; None: what the presets say.
        dynamic: torch.compile's dynamic shapes where nobody asks: of a model that runs its own forward, shapes with symbols are
            others than those of its latents, equal only for those who can calculate, and torch.cond takes no two.
        traces: `(transformer) -> bool`: whether a step can be one graph; else computed steps are its own, called.
        is_flow: whether it is a flow, or predicts noise or v; None: nobody knows.
        requests: of several callers in one batch; None where they are drawn one by one.

    """

    name: str
    architecture: Architecture
    calls: Calls
    checks: Checks
    attention_backend: Callable[[HostModule], Any]
    attention_kernel: Callable[[HostModule], AttentionKernel]
    target: Target | None = None
    dynamic: bool | None = None
    traces: Callable[[HostModule], bool] = always
    is_flow: bool | None = True
    requests: Requests | None = None


class Known(NamedTuple):
    """How a family is found.

    Attributes:
        name: of the family.
        transformers: names of its classes.
        pipelines: names of the classes of pipelines that are cached.
        family: `(class of the transformer) -> Family`.

    """

    name: str
    transformers: tuple[str, ...]
    pipelines: tuple[str, ...]
    family: Callable[[type], Family]
