"""One image's way through a schedule: every call of the transformer, from its inputs to its velocity."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from afcache.functional.decision import predict_error
from afcache.functional.given import Given
from afcache.functional.guidance import follow, weigh
from afcache.functional.initial import state_bytes
from afcache.functional.ranks.traffic import Call as Messages
from afcache.functional.state import CacheState, Coupling, Lead, StepRecord, StepSchedule, Trail
from afcache.models.family import Call
from afcache.runtime.branches import BranchCalls, find_branch, find_strays, states_of, trails_of
from afcache.runtime.compiled import CompiledStep
from afcache.runtime.foresight import Foresight
from afcache.runtime.guidance import Guidance
from afcache.runtime.notes import Correction, Restart, Role, TimedCall
from afcache.runtime.scheduler import ScheduledStep
from afcache.runtime.steps import Bound, empty_states
from afcache.runtime.switches import Steering, steering_of, version_of
from afcache.settings.config import CacheConfig

# Diffusers' pipelines have three; a runaway count means that the scheduler is not driven.
_MAX_CALLS = 8
# Of each branch of an image; the guards of later ones could only repeat themselves.
_GUARDED_CALLS = 2


@dataclass
class Trajectory:
    """One image's (or batch's) way through a schedule.

    Attributes:
        bound: what all images share.
        scheduled: the step that it started from; the identity of its tensors names the schedule.
        sigmas: noise levels on the model's device; float32.
        schedule: the steps from the first on; settings: of each image, which it holds.
        alone: the leading branch's coupling where there are no others.
        shape: of the latents; correction: how forecasts are caught up with; messages: what ranks exchange; None alone.
        kernel_name: attention backend that it started with; adapted: what adapters did to the model at the last step.
        foresight: the decisions that the host knows beforehand; None where each step's is read.
        thread: that makes its calls.
        index: the present step, with calls_at_index so far; index_before: the step before, -1 at the first.
        latents, source: of this step's first call, and the tensor that they came in; latents_before: of the step before.
        branches: guidance branches of the step before, the one that led first, then those that followed it, in order.
        strangers: others that were called there: a preview in a callback, or a prompt that was exchanged.
        called, strange: the same of this step.
        coupling: what the leader decided at this step, for those that follow.
        guidance: what is known of the true CFG scale.
        velocities: of all branches at this step, where one call computed them for all.
        calls: every call, for the report; restarts: what began anew, as far as the host has a part in it.

    """

    bound: Bound
    scheduled: ScheduledStep
    sigmas: Tensor
    schedule: list[StepSchedule]
    settings: tuple[CacheConfig, ...]
    alone: Coupling
    shape: torch.Size
    correction: Correction
    kernel_name: Any = None
    adapted: tuple[Any, ...] = ()
    messages: Messages | None = None
    foresight: Foresight | None = None
    thread: int = field(default_factory=threading.get_ident)
    index: int = -1
    index_before: int = -1
    calls_at_index: int = 0
    latents: Tensor | None = None
    source: tuple[Tensor, int | None] | None = None
    latents_before: Tensor | None = None
    branches: list[BranchCalls] = field(default_factory=list)
    strangers: list[BranchCalls] = field(default_factory=list)
    strange: list[BranchCalls] = field(default_factory=list)
    called: list[BranchCalls] = field(default_factory=list)
    coupling: Coupling | None = None
    guidance: Guidance = field(default_factory=Guidance)
    velocities: Tensor | None = None
    calls: list[TimedCall] = field(default_factory=list)
    restarts: list[Restart] = field(default_factory=list)

    @property
    def first_index(self) -> int:
        """Where in the schedule it started."""
        return self.scheduled.index

    @property
    def is_open(self) -> bool:
        """Whether there are steps left."""
        return self.index - self.first_index < len(self.schedule) - 1

    @property
    def present(self) -> list[BranchCalls]:
        """The branches of the present step, the leader first."""
        return self._of_last_step()[0]

    @property
    def bytes(self) -> int:
        """Memory of all branches' states."""
        return sum(map(state_bytes, states_of(self._known_branches())))

    @property
    def trails(self) -> tuple[Trail, ...]:
        """Where the branches of the present step lead; empty where nobody knows."""
        return trails_of(self.present)

    def begin_call(self, call: Call, index: int) -> None:
        """Find at which step a call is.

        Raises:
            RuntimeError: once more than guidance has branches.

        """
        if index != self.index:
            self.index_before, self.index, self.calls_at_index = self.index, index, 0
            self.branches, self.strangers = self._of_last_step()
            self.called, self.strange, self.coupling = [], [], None
            self.latents_before, self.latents, self.source = self.latents, call.latents, (call.source, version_of(call.source))
            self._forget_other_weights(call)
        if self.calls_at_index == _MAX_CALLS:
            raise RuntimeError(
                f"transformer was called {self.calls_at_index + 1} times at step {index}, more than guidance has branches "
                f"({_MAX_CALLS}). Call scheduler.step after each prediction, or use afcache.restore_pipeline(pipe)."
            )

    def take(self, call: Call) -> tuple[Tensor, StepRecord | None, Role]:
        """The velocity of one call."""
        return self._take_alone(call)

    def note(self, record: StepRecord | None, role: Role, elapsed: Callable[[], float]) -> None:
        """Keep what a call did for the report, unless an earlier call of the step computed it."""
        branch = self.calls_at_index
        self.calls_at_index += 1
        if self.velocities is None or branch == 0:
            self.calls.append(TimedCall(self.index, role, record, elapsed))

    @property
    def _position(self) -> int:
        """Of the present step among those that are walked."""
        return self.index - self.first_index

    def _take_alone(self, call: Call) -> tuple[Tensor, StepRecord | None, Role]:
        """One call for one guidance branch."""
        if not self.bound.config.rule.is_cached:
            role: Role = "follows" if self.calls_at_index else "leads"
            if self.bound.host is not None:
                return self.bound.host(call), None, role
            with self.bound.steps.traceable():
                return self._own(self._step()(call.inputs)), None, role
        steering = self._steering(call)
        branch = find_branch([*self.branches, *self.strangers], steering, step=self.index, count=call.branches)
        branch = BranchCalls(self._empty_states(call, call.branches)) if branch is None else branch
        branch.last_step = self.index
        self._steer(branch, steering)
        role = self._role(branch)
        coupling = self._couple(branch, role, call.latents)
        (self.strange if role == "joins" else self.called).append(branch)
        if len(states_of(self.called)) > 2:
            self.guidance.forget()
        velocity, record, lead = self._run(branch, call, coupling)
        velocity = self._own(velocity)
        branch.velocities, branch.has_history = velocity.chunk(call.branches), True
        if role == "leads":
            self.coupling = follow(coupling, record, lead)._replace(trails=self.alone.trails)
        return velocity, record, role

    def _role(self, branch: BranchCalls) -> Role:
        """What a branch does for the decision of its step: until the leader of the step before calls, all compute."""
        if self.coupling is not None:
            return "follows"
        return "leads" if not self.branches or branch is self.branches[0] else "joins"

    def _of_last_step(self) -> tuple[list[BranchCalls], list[BranchCalls]]:
        """What becomes of the branches of a step: the leader and its followers, and others. Where none led, the first will."""
        if self.called:
            return self.called, self.strange
        newest_first = sorted(self.strange, key=self.strangers.__contains__)
        return (newest_first, []) if self.strange else (self.branches, self.strangers)

    def _couple(self, branch: BranchCalls, role: Role, latents: Tensor) -> Coupling:
        """What a branch needs to decide, or to do what was decided."""
        if role == "leads":
            self._learn_guidance(latents)
            return self._lead(branch, [other for other in self.branches if other is not branch])
        coupling = self.coupling
        if coupling is None:
            branch.restart(torch.ones_like(self.alone.is_follower))
            return self.alone if self.foresight is None else self.foresight.for_stranger(self.alone)
        if coupling.lead is not None:
            coupling = coupling._replace(guidance_scale=self._known_scale(1, branch))
        if self.foresight is None:
            return coupling
        return self.foresight.for_follower(coupling, has_history=branch.has_history)

    def _own(self, velocity: Tensor) -> Tensor:
        """The velocity of a call in which all ranks computed the same guidance branch."""
        return velocity if self.bound.parallel is None else velocity[0]

    def _step(self) -> CompiledStep:
        return self.bound.steps.get(self.correction == "step", self.kernel_name)

    def _run(self, branch: BranchCalls, call: Call, coupling: Coupling) -> tuple[Tensor, StepRecord, Lead | None]:
        """A branch's next call, after which its state is the next one."""
        velocity, branch.states, record, lead = self._step_from(branch.states, branch, call, coupling)
        return velocity, record, lead

    def _step_from(self, states: Any, branch: BranchCalls, call: Call, coupling: Coupling) -> Any:
        """Velocity, next states, record and lead of a step; the first two of a branch check guards, then states are our own."""
        if self.bound.host is None:
            kind, step, inputs = None, self._step(), call.inputs
        else:
            kind = bool(coupling.known)
            step = self.bound.steps.around_host(self.correction == "step", is_computed=kind)
            inputs = Given(call.latents, self.bound.host(call) if kind else call.latents)
            coupling = coupling._replace(known=None)
        branch.calls[kind] = branch.calls.get(kind, 0) + 1
        arguments = (inputs, states, self.schedule[self._position], coupling)
        with self.bound.steps.traceable():
            if branch.calls[kind] > _GUARDED_CALLS and kind not in branch.unguarded:
                branch.unguarded[kind] = step.without_guards(*arguments)
            return branch.unguarded.get(kind, step)(*arguments)

    def _steering(self, call: Call) -> Steering:
        return steering_of(call.structure, call.conditions, call.is_controlled, self.bound.controls())

    def _steer(self, branch: BranchCalls, steering: Steering) -> None:
        switched = branch.steer(steering, is_foreseen=self.foresight is not None)
        if switched is not None:
            self.restarts.append(Restart(self.index, "conditioning", switched))

    def _empty_states(self, call: Call, count: int) -> tuple[CacheState, ...]:
        latents = call.latents
        made = {"device": latents.device, "count": count, "responds": self.correction == "solver"}
        return empty_states(self.bound, latents.shape, call.prefix_length, latents.dtype, **made)

    def _known_branches(self) -> list[BranchCalls]:
        return list(dict.fromkeys((*self.branches, *self.strangers, *self.called, *self.strange)))

    def _forget_other_weights(self, call: Call) -> None:
        """Start again where a callback has switched or rescaled adapters: the history is another model's."""
        adapted, self.adapted = self.adapted, self.bound.weights.adapted()
        if adapted != self.adapted:
            self.restarts.append(Restart(self.index, "weights"))
            self.forget(call)

    def forget(self, call: Call) -> None:
        """Let all branches begin anew."""
        for branch in self._known_branches():
            branch.forget(self._empty_states(call, len(branch.states)))

    def _learn_guidance(self, latents: Tensor) -> None:
        if self.latents_before is not None:
            schedule = self.schedule[self.index_before - self.first_index]
            self.guidance.learn(self.branches, self.latents_before, latents, schedule)

    def _lead(self, leader: BranchCalls, followers: list[BranchCalls]) -> Coupling:
        """What the leading branch needs to decide for all."""
        config, scale, coupling = self.bound.config, self._known_scale(0, leader), self.alone
        _, *states = states_of([leader, *followers])
        weights = weigh(scale, config=config) if states else (coupling.weight, coupling.weight)
        if len(leader.states) > 1:
            coupling = coupling._replace(lead=None)
        if config.forecasts_output and coupling.lead is None:
            # Where branches are called one after the other, the scale is for those who follow.
            coupling = coupling._replace(guidance_scale=scale)
        if states:
            schedule = self.schedule[self._position]
            others = sum(predict_error(state, schedule, config=config) for state in states)
            weight, others_weight = weights
            coupling = coupling._replace(weight=weight, others_error=others_weight * others)
        if self.foresight is None:
            is_watched = bool(coupling.trails and followers)
            return coupling._replace(trails=trails_of(followers)) if is_watched else coupling
        self._look_back([leader, *followers])
        return self.foresight.for_leader(self._position, coupling, [leader, *followers], weights)

    def _look_back(self, branches: list[BranchCalls]) -> None:
        """Begin anew where the latents are elsewhere: here the host must know it before the step, and waits for the device."""
        assert self.latents is not None
        astray = find_strays(branches, self.latents, self.schedule[self._position].sigma)
        if astray is not None and bool(astray.any()):
            self.restarts.append(Restart(self.index, "latents", astray))
            for branch in branches:
                branch.restart(astray)
                branch.has_history = False

    def _known_scale(self, place: int, branch: BranchCalls) -> Tensor:
        """The guidance scale per sample, for the first or second branch of the last step; NaN where it is unknown."""
        scale = self.guidance.known(self.branches, place, branch)
        return torch.full_like(self.alone.weight, float("nan")) if scale is None else scale
