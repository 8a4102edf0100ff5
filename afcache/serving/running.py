"""A request on its way, and the steps that lie before several of them."""

import dataclasses
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afcache.functional.state import CacheState, StepSchedule
from afcache.sampling.origin import Origin
from afcache.settings.config import CacheConfig


class Progress(NamedTuple):
    """How far a request is.

    Attributes:
        done: steps behind it; steps: all of them; both 0 before its first step and after its last.
        pattern: F for each step that was computed, . for one that was forecast.

    """

    done: int = 0
    steps: int = 0
    pattern: str = ""


class Standing(NamedTuple):
    """Where a request is between two ticks.

    Attributes:
        latents: of one sample.
        states: of each guidance branch.
        pattern: F for a step that was computed, . for one that was forecast.
        due: the step that it must compute next; the number of steps where none is left.

    """

    latents: Tensor
    states: tuple[CacheState, ...]
    pattern: str = ""
    due: int = 0


@dataclasses.dataclass(eq=False)
class Running:
    """A request on its way.

    Attributes:
        number: by which it is known.
        rank: those of a lower one are computed first, among those that have not waited for long.
        kind: shapes of its inputs, and what of them all samples share: requests of one kind can share a call.
        inputs: of each guidance branch; one sample.
        sigmas: noise levels of its schedule, one more than steps.
        steps: of its schedule; every field has a leading axis of steps.
        scale: of guidance, `[1]`.
        guidance_scale: the same, as it was given.
        config: its settings.
        standing: where it is; replaced as a whole, so that other threads may read it at any time.
        since: the tick from which it has been due.
        origin: what it is of, once a checkpoint has asked.

    """

    number: int
    rank: float
    kind: tuple[Hashable, Hashable]
    inputs: tuple[Any, ...]
    sigmas: Tensor
    steps: StepSchedule
    scale: Tensor
    guidance_scale: float
    config: CacheConfig
    standing: Standing
    since: int = 0
    origin: Origin | None = None

    @property
    def position(self) -> int:
        """Of the next step."""
        return len(self.standing.pattern)

    @property
    def due(self) -> int:
        """The step that it must compute next."""
        return self.standing.due

    @property
    def count(self) -> int:
        """Of steps."""
        return len(self.steps.sigma)

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return Progress(self.position, self.count, self.standing.pattern)

    @property
    def is_due(self) -> bool:
        """Whether its next step must be computed."""
        return self.position == self.due < self.count


def before_first(flags: list[bool]) -> int:
    """How many of them come before the first that is true."""
    return flags.index(True) if True in flags else len(flags)


def steps_from(requests: Iterable[Running], count: int, *, offset: int = 0) -> StepSchedule:
    """The next steps of all of them, `[count, batch]`; who has fewer left, or none, stays at the last one."""
    columns = [
        [None if field is None else _part(field, each.position + offset, count) for field in each.steps] for each in requests
    ]
    fields: list[Any] = [None if column[0] is None else torch.stack(column, -1) for column in zip(*columns, strict=True)]
    return StepSchedule(*fields)


def _part(values: Any, first: int, count: int) -> Tensor:
    """So many of them from the first one on, the last one again and again where there are fewer."""
    part = values[min(first, len(values) - 1) :][:count]
    return part if len(part) == count else torch.cat([part, part[-1:].expand(count - len(part))])
