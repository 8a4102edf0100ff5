"""Which requests compute together, and which are forecast: one tick after the other, in one thread.

A refresh has measured its error, and until the next one the estimate depends on the schedule alone: so each request knows at
which step it is due. A tick computes as many that are due as fit into one call, those that have waited longest first, and then
forecasts all others until every one is due: their steps cost almost nothing, and the next tick has all to choose from.
"""

import itertools
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afcache._typing import unchecked
from afcache.functional.decision import foresee
from afcache.functional.guidance import weigh
from afcache.functional.initial import state_bytes
from afcache.functional.model import Model
from afcache.functional.plans import stack_steps
from afcache.functional.state import CacheState, StepSchedule
from afcache.sampling.loop import prepare
from afcache.sampling.origin import origin_of
from afcache.serving.checkpoint import Kept, digest_of_latents, resume, write_request
from afcache.serving.intake import Departure
from afcache.serving.running import Progress, Running, Standing, before_first, steps_from
from afcache.serving.steps import served_step
from afcache.serving.together import Together, digest_of, kind_of
from afcache.settings.config import CacheConfig

# Forecast samples of a call, for each that a computed one may have.
_FORECASTS = 4
# (inputs, latents, states, schedule, guidance scale) -> (latents, states).
Step = Callable[..., tuple[Tensor, tuple[CacheState, ...]]]


class Arrived(NamedTuple):
    """A request that has come to its end.

    Attributes:
        number: of the request.
        latents: `[1, img_seq, channels]`; None where it failed.
        pattern: what its steps did.
        failure: what stopped it, or None.

    """

    number: int
    latents: Tensor | None
    pattern: str
    failure: Exception | None = None


class Engine:
    """All requests of one transformer.

    Args:
        transformer: owner of the weights.
        config: settings, of which each request may have another tolerance.
        max_batch: samples of one computed call.
        compiled: makes a graph of a step, of each kind and size of a call; None leaves steps as they are. Calls are filled up
            to a power of two, so that their sizes are few.
        patience: ticks after which a request that is due comes before all ranks.

    """

    def __init__(
        self,
        transformer: Any,
        *,
        config: CacheConfig,
        max_batch: int,
        compiled: Callable[[types.FunctionType], Step] | None = None,
        patience: int = 8,
    ) -> None:
        self.config = config
        self.ticks = 0
        self.computed: list[int] = []
        self._transformer = transformer
        self._compiled = compiled
        self._steps: dict[Hashable, Step] = {}
        self._max_batch = max_batch
        self._patience = patience
        self._running: dict[int, Running] = {}
        # Of each kind of shapes how inputs, and how states, become a batch.
        self._kinds: dict[Hashable, tuple[Together, Together]] = {}
        self._model: Model | None = None

    def __len__(self) -> int:
        return len(self._running)

    @property
    def state_bytes(self) -> int:
        """Memory of all states."""
        return sum(state_bytes(state) for request in list(self._running.values()) for state in request.standing.states)

    def progress(self, number: int) -> Progress:
        """How far a request is, from any thread; none of its steps where it is not here."""
        request = self._running.get(number)
        return Progress() if request is None else request.progress

    def checkpoint(self, number: int) -> bytes | None:
        """A request that is here as bytes, with which `admit` goes on; from any thread."""
        request = self._running.get(number)
        if request is None or self._model is None:
            return None
        if request.origin is None:
            told = {"guidance_scale": request.guidance_scale, "config": request.config}
            request.origin = origin_of(self._model, request.inputs, request.sigmas, **told)
        noise = digest_of_latents(request.inputs)
        return write_request(request.standing, target=request.config.target, origin=request.origin, noise=noise)

    def admit(
        self, number: int, departure: Departure, config: CacheConfig, rank: float = 0.0, *, start: Kept | None = None
    ) -> None:
        """Take a request in; its first step is due at once, or it goes on where a checkpoint left it.

        Raises:
            TypeError, ValueError, NotImplementedError: what `afcache.denoise` raises of its arguments.

        """
        inputs, *others = departure.branches
        device = inputs.hidden_states.device
        journey = prepare(
            self._transformer,
            (inputs, others[0] if others else None),
            departure.sigmas.to(device),
            guidance_scale=departure.guidance_scale,
            config=config,
            is_kept=start is not None,
        )
        self._model = journey.model
        standing = Standing(journey.start.latents, journey.start.states) if start is None else resume(start, journey)
        shapes = kind_of(journey.branches)
        if shapes not in self._kinds:
            self._kinds[shapes] = Together(journey.branches), Together(journey.start.states)
        self._running[number] = Running(
            number,
            rank,
            (shapes, digest_of(journey.branches)),
            journey.branches,
            departure.sigmas,
            stack_steps(journey.schedule),
            journey.guidance_scale,
            departure.guidance_scale,
            journey.config,
            standing,
            since=self.ticks,
        )

    def clear(self) -> None:
        """Forget all requests."""
        self._running.clear()

    def drop(self, number: int) -> bool:
        """Forget a request, and free its state; whether it was here."""
        return self._running.pop(number, None) is not None

    @unchecked()
    @torch.no_grad()
    def tick(self) -> list[Arrived]:
        """Compute one call of those that are due, and forecast all others until they are.

        Shapes were checked when the requests were taken in, and are not checked again at every step.
        """
        self.ticks += 1
        arrived = self._advance(self._choose(), is_computed=True)
        most = _FORECASTS * self._max_batch
        while ready := [each for each in self._running.values() if each.position < each.due]:
            for _, group in itertools.groupby(sorted(ready, key=lambda each: hash(each.kind)), key=lambda each: each.kind):
                members = list(group)
                for first in range(0, len(members), most):
                    arrived += self._advance(members[first : first + most], is_computed=False)
        return arrived

    def _choose(self) -> list[Running]:
        """Those that are computed next: of one kind, the longest waiting first."""
        due = sorted((each for each in self._running.values() if each.is_due), key=self._urgency)
        return [each for each in due if each.kind == due[0].kind][: self._max_batch]

    def _urgency(self, request: Running) -> tuple[bool, float, int, int]:
        is_patient = self.ticks - request.since < self._patience
        return is_patient, request.rank if is_patient else 0.0, request.since, request.number

    def _advance(self, requests: list[Running], *, is_computed: bool) -> list[Arrived]:
        """One computed step of all of them, or forecasts until the first is due; where a call fails, each by itself."""
        if not requests:
            return []
        count = 1 if is_computed else min(each.due - each.position for each in requests)
        failure = None
        try:
            latents, states = self._call(requests, count, is_computed=is_computed)
            due = self._foresee(requests, states) if is_computed else [each.due for each in requests]
        except Exception as error:
            failure = error.with_traceback(None)
        if failure is not None:
            # Not within the except clause, which keeps the memory of the call that failed.
            if len(requests) > 1:
                return [arrived for each in requests for arrived in self._advance([each], is_computed=is_computed)]
            return [self._end(requests[0], failure)]
        apart = self._kinds[requests[0].kind[0]][1].split(states, len(requests))
        for place, request in enumerate(requests):
            pattern = request.standing.pattern + ("F" if is_computed else "." * count)
            request.standing = Standing(latents[place : place + 1].clone(), apart[place], pattern, due[place])
            request.since = self.ticks
        if is_computed:
            self.computed.append(len(requests))
        return [self._end(each) for each in requests if each.position == each.count]

    def _end(self, request: Running, failure: Exception | None = None) -> Arrived:
        del self._running[request.number]
        standing = request.standing
        return Arrived(request.number, standing.latents if failure is None else None, standing.pattern, failure)

    def _call(self, requests: Sequence[Running], count: int, *, is_computed: bool) -> tuple[Tensor, tuple[CacheState, ...]]:
        """So many steps of all of them."""
        filled = [*requests, *[requests[0]] * self._missing(len(requests))]
        of_inputs, of_states = self._kinds[requests[0].kind[0]]
        inputs, states = (
            of_inputs.stack([each.inputs for each in filled]),
            of_states.stack([each.standing.states for each in filled]),
        )
        latents = torch.cat([each.standing.latents for each in filled])
        scale = torch.cat([each.scale for each in filled])
        schedules = steps_from(filled, count)
        step = self._step_of(requests[0].kind[0], len(filled), is_computed=is_computed)
        for index in range(count):
            fields: list[Any] = [None if field is None else field[index].clone() for field in schedules]
            latents, states = step(inputs, latents, states, StepSchedule(*fields), scale)
        return latents, states

    def _missing(self, count: int) -> int:
        """To the next power of two, where calls are compiled."""
        if self._compiled is None:
            return 0
        power = 1 << (count - 1).bit_length()
        return (power if count > self._max_batch else min(power, self._max_batch)) - count

    def _step_of(self, kind: Hashable, size: int, *, is_computed: bool) -> Step:
        key = (kind, size, is_computed)
        if key not in self._steps:
            assert self._model is not None
            model, config = self._model, self.config

            def step(inputs: Any, latents: Any, states: Any, schedule: Any, guidance_scale: Any) -> Any:
                known: dict[str, Any] = {"config": config, "is_computed": is_computed}
                return served_step(model, inputs, latents, states, schedule, guidance_scale, **known)

            self._steps[key] = step if self._compiled is None else self._compiled(step)
        return self._steps[key]

    def _foresee(self, requests: Sequence[Running], states: tuple[CacheState, ...]) -> list[int]:
        """At which step each of them is due after the computed one: one wait for the device."""
        left = [each.count - each.position - 1 for each in requests]
        filled = [*requests, *[requests[0]] * self._missing(len(requests))]
        steps = steps_from(filled, max(1, *left), offset=1)
        scale = torch.cat([each.scale for each in filled])
        leader, *others = states
        ones = torch.ones_like(scale)
        weights = weigh(scale, config=self.config) if others else (ones, ones)
        if self.config.rule.is_error_controlled:
            flags = foresee(leader, tuple(others), steps, *weights, config=self.config)[:, : len(requests)]
        else:
            flags = steps.is_forced[:, : len(requests)]
        cached = [before_first(column[:count]) for column, count in zip(flags.T.tolist(), left, strict=True)]
        return [each.position + 1 + count for each, count in zip(requests, cached, strict=True)]
