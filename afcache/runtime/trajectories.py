"""The images that are under way, and which of them a call belongs to: told by scheduler, thread and latents."""

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afcache.functional.continuity import miss
from afcache.models.family import Call
from afcache.runtime.notes import Restart
from afcache.runtime.scheduler import ScheduledStep
from afcache.runtime.switches import version_of
from afcache.runtime.trajectory import Trajectory

# Of one scheduler; the one that was called least recently is forgotten.
_MOST = 8


class Place(NamedTuple):
    """Where a call may be.

    Attributes:
        scheduler: that is at this step.
        step: the step.
        trajectory: that would go on with the call; None begins one.

    """

    scheduler: Any
    step: ScheduledStep
    trajectory: Trajectory | None = None


class Trajectories:
    """Those that may go on, by scheduler; and each scheduler's last, for the report."""

    def __init__(self) -> None:
        # The one that was called last is last.
        self._of: weakref.WeakKeyDictionary[Any, list[Trajectory]] = weakref.WeakKeyDictionary()

    def last(self, scheduler: Any) -> Trajectory | None:
        """The trajectory that a scheduler ran last."""
        return next(reversed(self._of.get(scheduler, [])), None)

    def expects(self, scheduler: Any, step: ScheduledStep) -> bool:
        """Whether a call at this step is the next of a trajectory, so that there is no need to see that its timestep fits."""
        last = self.last(scheduler)
        return last is not None and step.is_of(last.scheduled) and step.index in (last.index, last.index + 1)

    def begin(self, scheduler: Any, trajectory: Trajectory) -> None:
        """Add one. Those over another schedule cannot go on, nor those at their end."""
        _resume(trajectory, self.last(scheduler))
        others = [each for each in self._of.get(scheduler, []) if each.is_open and trajectory.scheduled.is_of(each.scheduled)]
        self._of[scheduler] = [*others[1 - _MOST :], trajectory]

    def end(self, scheduler: Any, trajectory: Trajectory) -> None:
        """Forget one."""
        self._of[scheduler] = [each for each in self._of.get(scheduler, []) if each is not trajectory]

    def find(self, call: Call, places: list[tuple[Any, ScheduledStep]]) -> Place:
        """Where a call belongs.

        A schedule that nobody walks yet is about to be begun. Where one trajectory alone may go on, it does: its step sees
        whether the latents are where they should be. Else they are looked at here, which waits for the device.

        Args:
            call: of the transformer.
            places: the schedulers that may be running, and their present steps; one at least.

        Raises:
            RuntimeError: another thread draws with the scheduler.

        """
        known = [Place(*place, trajectory) for place in places for trajectory in self._waiting(*place)]
        known = [place for place in known if place.trajectory is not None and _is_alike(place.trajectory, call)]
        unseen = [Place(*place) for place in places if not self._is_walked(*place)]
        found = _find_by_tensor(call, known)
        if found is None:
            found = _find_alone(known) if not unseen else None
        if found is None:
            found = _find_by_latents(call, known)
        if found is None and unseen:
            found = unseen[0]
        if found is None:
            found = _find_next(known)
        if found is None:
            self._check_threads(places)
            found = Place(*places[-1])
        if found.trajectory is not None:
            found.trajectory.thread = threading.get_ident()
            self._touch(found)
        return found

    def _waiting(self, scheduler: Any, step: ScheduledStep) -> list[Trajectory]:
        """Trajectories that a call at this step may belong to, the one that was called last first."""
        return [
            each
            for each in reversed(self._of.get(scheduler, []))
            if step.is_of(each.scheduled) and step.index in (each.index, each.index + 1)
        ]

    def _is_walked(self, scheduler: Any, step: ScheduledStep) -> bool:
        return any(step.timesteps is each.scheduled.timesteps for each in self._of.get(scheduler, []))

    def _check_threads(self, places: list[tuple[Any, ScheduledStep]]) -> None:
        """Raise where a scheduler that counts its steps is driven by two threads: it holds one image's state."""
        here = threading.get_ident()
        for scheduler, step in places:
            others = [each for each in self._of.get(scheduler, []) if each.is_open and each.thread != here]
            if getattr(scheduler, "step_index", None) is not None and any(step.is_of(each.scheduled) for each in others):
                raise RuntimeError(
                    f"pipe is called by thread {here}, and thread {others[-1].thread} draws with the same "
                    f"{type(scheduler).__name__}, which holds the state of one image. Give each thread a pipeline with a "
                    "scheduler of its own (type(pipe).from_pipe(pipe, scheduler=...)), passed to afcache.compile_pipeline, or "
                    "let them take turns."
                )

    def _touch(self, place: Place) -> None:
        """Let a trajectory be the one that was called last."""
        others = [each for each in self._of[place.scheduler] if each is not place.trajectory]
        assert place.trajectory is not None
        self._of[place.scheduler] = [*others, place.trajectory]


def _find_by_tensor(call: Call, known: list[Place]) -> Place | None:
    """At whose present step the latents came in the very tensor of this call: another guidance branch."""
    source, version = call.source, version_of(call.source)
    for place in known:
        trajectory = place.trajectory
        assert trajectory is not None
        if place.step.index == trajectory.index and trajectory.source is not None:
            first, its_version = trajectory.source
            if first is source and its_version == version:
                return place
    return None


def _find_alone(known: list[Place]) -> Place | None:
    """The one trajectory of this thread that may go on, if it goes on with its next step."""
    mine = [place for place in known if _is_mine(place)]
    return mine[0] if len(mine) == 1 and _is_next(mine[0]) else None


def _find_by_latents(call: Call, known: list[Place]) -> Place | None:
    """The trajectory whose latents these are: of those within reach the nearest, of this thread's first."""
    missed = [(_miss(place, call), not _is_mine(place), order) for order, place in enumerate(known)]
    nearest = min((each for each in missed if each[0] <= 1), default=None)
    return None if nearest is None else known[nearest[2]]


def _find_next(known: list[Place]) -> Place | None:
    """Where nobody's latents are given: the last one that waits for its next step. The step will find that out."""
    return next((place for place in known if _is_mine(place) and _is_next(place)), None)


def _is_mine(place: Place) -> bool:
    return place.trajectory is not None and place.trajectory.thread == threading.get_ident()


def _is_next(place: Place) -> bool:
    return place.trajectory is not None and place.step.index == place.trajectory.index + 1


def _miss(place: Place, call: Call) -> float:
    """How far a call's nearest sample is from where a trajectory is, or leads; at most 1 is near. Waits for the device."""
    trajectory, latents = place.trajectory, call.latents
    assert trajectory is not None
    if not _is_next(place):
        is_there = trajectory.latents is not None and torch.equal(_comparable(latents), _comparable(trajectory.latents))
        return 0.0 if is_there else float("inf")
    trails = trajectory.trails
    if not trails:
        return 0.0
    found = miss(latents, trails, trajectory.sigmas[place.step.index])
    return float(torch.nan_to_num(found, nan=float("inf"), posinf=float("inf")).min())


def _is_alike(trajectory: Trajectory, call: Call) -> bool:
    """Whether latents are of the shape and on the device of a trajectory's; autocast may change their dtype on the way."""
    return trajectory.shape == call.latents.shape and trajectory.sigmas.device == call.latents.device


def _comparable(latents: Tensor) -> Tensor:
    return torch.nan_to_num(latents.to(torch.float32))


def _resume(trajectory: Trajectory, before: Trajectory | None) -> None:
    """Note why a trajectory begins in the middle of a schedule that another one was walking.

    Where the noise levels were edited it is the same image, and its calls so far are the report's, too.

    Args:
        trajectory: a new one.
        before: the last of its scheduler.

    """
    if before is None or not before.is_open or before.scheduled.timesteps is not trajectory.scheduled.timesteps:
        return
    first = trajectory.first_index
    if not trajectory.scheduled.is_of(before.scheduled) and first == before.index + 1:
        trajectory.calls, trajectory.restarts = before.calls, [*before.restarts, Restart(first, "schedule")]
    elif first != before.first_index:
        is_elsewhere = first in (before.index, before.index + 1)
        trajectory.restarts = [Restart(first, "latents" if is_elsewhere else "steps")]
