"""What the host side must know of a family of models: how its pipelines call it, and what we refuse to cache."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from afcache._typing import Flag, HostModule, Latents, PerSample
from afcache.functional.model import Architecture, AttentionKernel


class Call(NamedTuple):
    """One call of the transformer, as the runtime reads it.

    Attributes:
        inputs: what the architecture's `embed` takes.
        latents: of the sample, `[batch, img_seq, ...]`; what the scheduler steps.
        source: the tensor that they came in; guidance branches of a step are mostly given the same one.
        timestep: `[batch]`, as the pipeline gave it.
        prefix_length: tokens that the blocks see before the image's.
        conditions: what pipelines hand over unchanged from step to step.
        is_controlled: whether a ControlNet says anything, bool, 0-d; None without one.
        structure: shapes of all inputs; calls of another structure are other code.
        ask: `(forward) -> velocity [batch, img_seq, ...]` by the host's own forward; None where inputs were made by hand.

    """

    inputs: Any
    latents: Latents
    source: Tensor
    timestep: PerSample
    prefix_length: int
    conditions: tuple[Tensor, ...]
    is_controlled: Flag | None
    structure: Any
    ask: Callable[[Callable[..., Any]], Tensor] | None = None


class Calls(NamedTuple):
    """How pipelines call the transformer.

    Attributes:
        reader: `(transformer) -> reader`: keeps what is read once of several calls.
        answer: `(transformer, reader, forward, *args, **kwargs)`: the host's forward by ours, which maps a `Call` to a
            velocity.
        read: `(inputs) -> Call` of inputs that are made of a call's.
        of_branches: fields of the inputs in which guidance branches differ.
        describe: `(inputs, is_later=) -> {name: value}`: what all ranks of an image must be given alike.
        probe: `(transformer, dtype=, device=) -> inputs` of a small sample, always the same.

    """

    reader: Callable[[HostModule], Any]
    answer: Callable[..., Any]
    read: Callable[[Any], Call]
    of_branches: tuple[str, ...]
    describe: Callable[..., dict[str, Any]]
    probe: Callable[..., Any]


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


class Family(NamedTuple):
    """A family of models.

    Attributes:
        name: as users call it.
        transformer: its class.
        pipelines: classes of the pipelines that are cached.
        architecture: the parts of the model.
        calls: how pipelines call it.
        checks: what is refused.
        attention_backend: `(transformer) -> name` of the host's attention kernel; None: torch's own.
        attention_kernel: `(transformer) -> AttentionKernel` of that name.

    """

    name: str
    transformer: type
    pipelines: tuple[type, ...]
    architecture: Architecture
    calls: Calls
    checks: Checks
    attention_backend: Callable[[HostModule], Any]
    attention_kernel: Callable[[HostModule], AttentionKernel]
