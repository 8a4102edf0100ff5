"""The pipelines that share a transformer, and which of their schedulers is running."""

import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from afcache.models.family import CLOCKS, Clock
from afcache.runtime.controls import Controls, controls_of, watch
from afcache.runtime.scheduler import ScheduledStep, check_beside, check_scheduler, read_step


class Served:
    """A pipeline whose schedulers are read at every call; when the pipeline is gone, its last ones still count.

    Args:
        pipe: the pipeline.
        beside: its scheduler of what is drawn beside the sample; "" where that has no schedule of its own.

    """

    def __init__(self, pipe: Any, beside: str = "") -> None:
        self._reference = weakref.ref(pipe)
        self._name = beside
        # A pipeline that is being deep-copied has no scheduler yet.
        self._scheduler = getattr(pipe, "scheduler", None)
        self._beside = getattr(pipe, beside, None) if beside else None

    @property
    def pipe(self) -> Any:
        """The pipeline, or None."""
        return self._reference()

    @property
    def scheduler(self) -> Any:
        """The pipeline's present scheduler."""
        pipe = self._reference()
        if pipe is not None:
            self._scheduler = pipe.scheduler
        return self._scheduler

    @property
    def beside(self) -> Any:
        """Its present scheduler of what is drawn beside the sample."""
        pipe = self._reference()
        if pipe is not None:
            self._beside = getattr(pipe, self._name, None)
        return self._beside


class Pipelines:
    """All pipelines that are served; those made by `from_pipe` share the transformer.

    Args:
        beside: their scheduler of what is drawn beside the sample; "" where that has no schedule of its own.
        is_flow: whether the model is a flow, or predicts noise or v; None: nobody knows.

    """

    def __init__(self, beside: str = "", *, is_flow: bool | None = None) -> None:
        self._beside, self._is_flow = beside, is_flow
        self._served: list[Served] = []

    def add(self, pipe: Any) -> None:
        """Read the scheduler of this pipeline, too."""
        if all(known is not pipe for known in self.alive()):
            self._served.append(Served(pipe, self._beside))
        watch([pipe])

    def alive(self) -> list[Any]:
        """Those that still exist."""
        return [served.pipe for served in self._served if served.pipe is not None]

    def watch_controls(self) -> None:
        """Note what their present ControlNets are called with."""
        watch(self.alive())

    def controls(self) -> Controls:
        """What their ControlNets were called with last."""
        return controls_of(self.alive())

    def find_clocks(self, timestep: Tensor) -> list[Clock]:
        """What a transformer may count of which nobody said it: one clock mostly; at a timestep of 0 several fit.

        Args:
            timestep: the transformer's argument.
        Cost:
            waits for the device.

        """
        schedulers = [served.scheduler for served in self._served]
        return [
            clock
            for clock in CLOCKS
            if any(read_step(scheduler, timestep, clock, verify=True) is not None for scheduler in schedulers)
        ]

    def locate(
        self, timestep: Tensor, clock: Clock, *, expects: Callable[[Any, ScheduledStep], bool], forecasts: bool
    ) -> list[tuple[Any, ScheduledStep]]:
        """The schedulers that may be running, and the steps they are at: those whose present step fits the timestep.

        Of several, that of the pipeline which calls, if one does.

        Args:
            timestep: the transformer's argument.
            clock: what it counts.
            expects: whether a scheduler's step is the next one of what it runs.
            forecasts: whether any step is forecast.

        Raises:
            RuntimeError: the timestep fits no schedule.
            NotImplementedError: a scheduler changed into something unsupported.

        """
        schedulers = list({id(served.scheduler): served.scheduler for served in self._served}.values())
        # Reading the timestep waits for the device, so accelerators verify what is not a trajectory's next step only.
        is_free = timestep.device.type == "cpu"
        found: list[tuple[Any, ScheduledStep]] = []
        for scheduler in schedulers:
            check_scheduler(scheduler, forecasts=forecasts, is_flow=self._is_flow)

            def is_doubtful(step: ScheduledStep, scheduler: Any = scheduler) -> bool:
                return is_free or len(schedulers) > 1 or not expects(scheduler, step)

            step = read_step(scheduler, timestep, clock, verify=is_doubtful)
            if step is not None:
                found.append((scheduler, step))
        if not found:
            value = float(clock.read(timestep)[0])
            raise RuntimeError(
                f"timestep {value:.4g} does not fit the present step of pipe.scheduler"
                f" ({', '.join(type(s).__name__ for s in schedulers)}). If another pipeline with its own scheduler shares "
                "this transformer, call afcache.compile_pipeline on that pipeline too; if you call the transformer yourself, "
                "drive pipe.scheduler, or use afcache.restore_pipeline(pipe) first. If two threads draw, give each a pipeline "
                "with a scheduler of its own."
            )
        caller = self._caller() if len(found) > 1 else None
        of_caller = [] if caller is None else [place for place in found if place[0] is caller.scheduler]
        return of_caller or found

    def levels(self, scheduler: Any, step: ScheduledStep) -> tuple[Tensor, Tensor, int]:
        """Noise levels of the sample, those of what is drawn beside it, and the present step of both.

        Args:
            scheduler, step: the sample's.

        Raises:
            NotImplementedError: what is beside it has a scheduler that cannot be put on the sample's schedule.

        """
        beside = next(served.beside for served in self._served if served.scheduler is scheduler)
        check_beside(self._beside, beside, scheduler)
        return step.sigmas, beside.sigmas, step.index

    def _caller(self) -> Any:
        """The served pipeline whose call this is, innermost first, as the stack has it; None in a loop by hand."""
        pipes = self.alive()
        frame = inspect.currentframe()
        while frame is not None:
            # Reading the locals of every frame would cost more than the question is worth.
            owner = frame.f_locals.get("self") if frame.f_code.co_name == "__call__" else None
            if any(owner is pipe for pipe in pipes):
                return owner
            frame = frame.f_back
        return None
