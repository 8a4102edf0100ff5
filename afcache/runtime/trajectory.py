"""One image's way through a schedule: every call of the transformer, from its inputs to its velocity."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from afcache.functional.decision import predict_error
from afcache.functional.given import Given
from afcache.functional.guidance import follow, weigh
from afcache.functional.initial import empty_state, shape_of, state_bytes
from afcache.functional.ranks.traffic import Call as Messages
from afcache.functional.state import CacheState, Coupling, Lead, StepRecord, StepSchedule
from afcache.models.family import Call
from afcache.runtime.branches import BranchCalls, guidance_of_step
from afcache.runtime.clock import TimedCall
from afcache.runtime.compiled import CompiledStep
from afcache.runtime.foresight import Foresight
from afcache.runtime.scheduler import ScheduledStep
from afcache.runtime.steps import Bound
from afcache.runtime.switches import steering_of
from afcache.settings.config import CacheConfig

# Diffusers' pipelines have two; a runaway count means that the scheduler is not driven.
_MAX_BRANCHES = 4
# Of each branch of an image; the guards of later ones could only repeat themselves.
_GUARDED_CALLS = 2


@dataclass
class Trajectory:
    """One image's (or batch's) way through a schedule.

    Attributes:
        bound: what all images share.
        timesteps: the scheduler's tensor, whose identity names the trajectory.
        sigmas: noise levels on the model's device; float32.
        schedule: the steps from `first_index` on.
        settings: of each image, which the schedule holds.
        alone: the leading branch's coupling where there are no others.
        first_index: where in the schedule it started.
        shape: of the latents.
        corrects: whether the catch-up correction is on.
        kernel_name: attention backend that the trajectory started with.
        adapted: what adapters did to the model at the last step.
        messages: what ranks exchange; None alone.
        foresight: the decisions that the host knows beforehand; None where each step's is read.
        index: the present step.
        calls_at_index: transformer calls at this step so far.
        index_before: the step before, -1 at the first; calls_before: the calls there.
        branches: guidance branches in order of their first call.
        coupling: what the leading branch decided at this step, for those that follow.
        guidance_scale: true CFG scale per sample, NaN where unknown; None without two branches.
        learns_guidance: whether the scale of the present branches is still to be inferred.
        latents_before: the input of the step before, until it is.
        conditioning: in what the first step's inputs of every branch differ, where other ranks compute some of them.
        velocities: of all branches at this step, where one call computed them for all.
        calls: every call, for the report.

    """

    bound: Bound
    timesteps: Tensor
    sigmas: Tensor
    schedule: list[StepSchedule]
    settings: tuple[CacheConfig, ...]
    alone: Coupling
    first_index: int
    shape: torch.Size
    corrects: bool
    kernel_name: Any = None
    adapted: tuple[Any, ...] = ()
    messages: Messages | None = None
    foresight: Foresight | None = None
    index: int = -1
    calls_at_index: int = 0
    index_before: int = -1
    calls_before: int = 0
    branches: list[BranchCalls] = field(default_factory=list)
    coupling: Coupling | None = None
    guidance_scale: Tensor | None = None
    learns_guidance: bool = True
    latents_before: Tensor | None = None
    conditioning: list[dict[str, Any]] = field(default_factory=list)
    velocities: Tensor | None = None
    calls: list[TimedCall] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Memory of all branches' states."""
        return sum(state_bytes(branch.state) for branch in self.branches)

    def is_left(self, step: ScheduledStep, shape: torch.Size) -> bool:
        """A schedule made anew, or one that is walked again from an earlier step, or begun again in another shape."""
        is_restarted = step.index < self.index or (step.index == self.first_index and shape != self.shape)
        return step.timesteps is not self.timesteps or is_restarted

    def begin_call(self, call: Call, index: int) -> None:
        """Find which guidance branch calls, at which step.

        Raises:
            RuntimeError: with latents of another shape, or once more than guidance has branches.

        """
        if call.latents.shape != self.shape:
            raise RuntimeError(
                f"hidden_states changed from {tuple(self.shape)} to {tuple(call.latents.shape)} within one trajectory. Call "
                "scheduler.set_timesteps before sampling another shape."
            )
        if index != self.index:
            self.index_before, self.calls_before = self.index, self.calls_at_index
            self.index, self.calls_at_index = index, 0
            self._forget_other_weights(call)
        if self.calls_at_index == _MAX_BRANCHES:
            raise RuntimeError(
                f"transformer was called {self.calls_at_index + 1} times at step {index}, more than guidance has branches "
                f"({_MAX_BRANCHES}). Call scheduler.step after each prediction, or use afcache.restore_pipeline(pipe)."
            )

    def take(self, call: Call) -> tuple[Tensor, StepRecord | None]:
        """The velocity of one call."""
        return self._take_alone(call)

    def note(self, record: StepRecord | None, elapsed: Callable[[], float]) -> None:
        """Keep what a call did for the report, unless an earlier call of the step computed it."""
        branch = self.calls_at_index
        self.calls_at_index += 1
        if self.velocities is None or branch == 0:
            self.calls.append(TimedCall(self.index, branch, record, elapsed))

    @property
    def _position(self) -> int:
        """Of the present step among those that are walked."""
        return self.index - self.first_index

    def _take_alone(self, call: Call) -> tuple[Tensor, StepRecord | None]:
        """One call for one guidance branch."""
        if not self.bound.config.rule.is_cached:
            if self.bound.host is not None:
                return self.bound.host(call), None
            with self.bound.steps.traceable():
                return self._own(self._step()(call.inputs)), None
        branch_index = self.calls_at_index
        if branch_index == len(self.branches):
            self.branches.append(BranchCalls(self._empty_state(call)))
            if branch_index == 2:
                # One number says nothing of three branches: each one's own error counts in full.
                self.guidance_scale, self.learns_guidance = None, False
        branch = self.branches[branch_index]
        if branch.calls and branch.last_step != self.index_before:
            # Guidance was off for a while: what the branch knows is of steps long past.
            branch.forget(self._empty_state(call))
            self.learns_guidance = True
        branch.last_step = self.index
        self._steer(branch, call)
        if branch_index == 0:
            self._learn_guidance(call.latents)
        coupling = self._lead() if branch_index == 0 else self._follow(branch)
        velocity, record, lead = self._run(branch, call, coupling)
        velocity, branch.has_history = self._own(velocity), True
        if branch_index == 0:
            self.coupling = follow(coupling, record, lead)
            if lead is not None:
                self.coupling = self.coupling._replace(guidance_scale=self._known_scale())
        if self.learns_guidance:
            self.latents_before = call.latents if branch_index == 0 else self.latents_before
            branch.velocity = velocity
        return velocity, record

    def _own(self, velocity: Tensor) -> Tensor:
        """The velocity of a call in which all ranks computed the same guidance branch."""
        return velocity if self.bound.parallel is None else velocity[0]

    def _step(self) -> CompiledStep:
        return self.bound.steps.get(self.corrects, self.kernel_name)

    def _run(self, branch: BranchCalls, call: Call, coupling: Coupling) -> tuple[Tensor, StepRecord, Lead | None]:
        """A branch's next call, after which its state is the next one."""
        velocity, branch.state, record, lead = self._step_from(branch.state, branch, call, coupling)
        return velocity, record, lead

    def _step_from(self, state: Any, branch: BranchCalls, call: Call, coupling: Coupling) -> Any:
        """Velocity, next state, record and lead of a step; the first two of a branch check guards, then a state is our own."""
        if self.bound.host is None:
            kind, step, inputs = None, self._step(), call.inputs
        else:
            kind = bool(coupling.known)
            step = self.bound.steps.around_host(self.corrects, is_computed=kind)
            inputs = Given(call.latents, self.bound.host(call) if kind else call.latents)
            coupling = coupling._replace(known=None)
        branch.calls[kind] = branch.calls.get(kind, 0) + 1
        arguments = (inputs, state, self.schedule[self._position], coupling)
        with self.bound.steps.traceable():
            if branch.calls[kind] > _GUARDED_CALLS and kind not in branch.unguarded:
                branch.unguarded[kind] = step.without_guards(*arguments)
            return branch.unguarded.get(kind, step)(*arguments)

    def _steer(self, branch: BranchCalls, call: Call) -> None:
        steering = steering_of(call.structure, call.conditions, call.is_controlled, self.bound.controls())
        branch.steer(steering, is_foreseen=self.foresight is not None)

    def _empty_state(self, call: Call) -> CacheState:
        """Of a guidance branch, on this rank: of its share of the tokens, or, where outputs are forecast, of the whole."""
        config, parallel = self.bound.config, self.bound.parallel
        shards = 1 if parallel is None or config.forecasts_output else parallel.layout.sequence.whole.size
        shape = shape_of(self.bound.steps.sizes, call.latents.shape, call.prefix_length, config=config)._replace(shards=shards)
        return empty_state(shape, config=config, dtype=call.latents.dtype, device=call.latents.device)

    def _forget_other_weights(self, call: Call) -> None:
        """Start again where a callback has switched or rescaled adapters: the history is another model's."""
        adapted = self.bound.weights.adapted()
        if adapted != self.adapted:
            self.adapted = adapted
            for branch in self.branches:
                branch.forget(self._empty_state(call))

    def _learn_guidance(self, latents: Tensor) -> None:
        """Infer the guidance scale from the first step of both branches that the scheduler took."""
        if self.latents_before is None or not self.learns_guidance or self._position == 0:
            return
        if self.calls_before == len(self.branches) == 2:
            first, second = (branch.velocity for branch in self.branches)
            assert first is not None
            assert second is not None
            length = self.sigmas[self.index_before + 1] - self.sigmas[self.index_before]
            self.guidance_scale = guidance_of_step(self.latents_before, latents, length, velocities=(first, second))
            self.learns_guidance = False
        self.latents_before = None
        for branch in self.branches:
            branch.velocity = None

    def _lead(self) -> Coupling:
        """What the leading branch needs to decide for all."""
        leader, *followers = self.branches[: max(1, self.calls_before)]
        config, scale, coupling = self.bound.config, self._known_scale(), self.alone
        weights = weigh(scale, config=config) if followers else (coupling.weight, coupling.weight)
        if config.forecasts_output and coupling.lead is None:
            # Where branches are called one after the other, the scale is for those who follow.
            coupling = coupling._replace(guidance_scale=scale)
        if followers:
            schedule = self.schedule[self._position]
            others = sum(predict_error(branch.state, schedule, config=config) for branch in followers)
            weight, others_weight = weights
            coupling = coupling._replace(weight=weight, others_error=others_weight * others)
        if self.foresight is None:
            return coupling
        states = [branch.state for branch in (leader, *followers)]
        return self.foresight.for_leader(self._position, coupling, states, weights, has_history=leader.has_history)

    def _known_scale(self) -> Tensor:
        """The guidance scale per sample, NaN where it is unknown."""
        return torch.full_like(self.alone.weight, float("nan")) if self.guidance_scale is None else self.guidance_scale

    def _follow(self, branch: BranchCalls) -> Coupling:
        """The other branches do what the leader did."""
        assert self.coupling is not None
        if self.foresight is None:
            return self.coupling
        return self.foresight.for_follower(self.coupling, has_history=branch.has_history)
