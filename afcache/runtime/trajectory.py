"""One image's way through a schedule: every call of the transformer, from its inputs to its velocity."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from afcache.functional.decision import predict_error
from afcache.functional.guidance import follow, infer_guidance
from afcache.functional.initial import StateShape, empty_state, state_bytes
from afcache.functional.ranks.traffic import Call as Messages
from afcache.functional.state import CacheState, Coupling, StepRecord, StepSchedule
from afcache.models.family import Call
from afcache.parallel.agreement import check_same_task, check_votes
from afcache.parallel.groups import ParallelContext
from afcache.runtime.branches import BRANCHES, BranchCalls, check_conditioning, weigh
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
        branches: guidance branches in order of their first call.
        coupling: what the leading branch decided at this step, for those that follow.
        guidance_scale: true CFG scale per sample, NaN where unknown; None without two branches.
        first_latents: the first step's input, until the guidance scale is known.
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
    branches: list[BranchCalls] = field(default_factory=list)
    coupling: Coupling | None = None
    guidance_scale: Tensor | None = None
    first_latents: Tensor | None = None
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
            self.index, self.calls_at_index = index, 0
            self._forget_other_weights(call)
        if self.calls_at_index == _MAX_BRANCHES:
            raise RuntimeError(
                f"transformer was called {self.calls_at_index + 1} times at step {index}, more than guidance has branches "
                f"({_MAX_BRANCHES}). Call scheduler.step after each prediction, or use afcache.restore_pipeline(pipe)."
            )

    def take(self, call: Call) -> tuple[Tensor, StepRecord | None]:
        """The velocity of one call, alone or together with other ranks."""
        return self._take_alone(call) if self.bound.parallel is None else self._take_together(call, self.bound.parallel)

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

    def _take_together(self, call: Call, parallel: ParallelContext) -> tuple[Tensor, StepRecord | None]:
        """One call of several ranks, which compare what they are about to draw."""
        branch, is_first = self.calls_at_index, self._position == 0
        # Guidance scales show at the second step, and that a rank has a branch more than others.
        is_second = self._position == 1 and branch == 0
        if is_first or is_second or (parallel.layout.checks and branch == 0):
            check_same_task(parallel, self._describe(call))
        if parallel.splits_guidance and is_first:
            self.conditioning.append(self._conditioning_of(call))
        elif parallel.splits_guidance:
            return self._take_split(call, parallel)
        velocity, record = self._take_alone(call)
        check_votes(record, self.index)
        return velocity, record

    def _take_split(self, call: Call, parallel: ParallelContext) -> tuple[Tensor, StepRecord | None]:
        """One call for all guidance branches: this rank computes its own, and the others' velocities come with it.

        What a branch is conditioned on was seen at the first step, at which every rank computed all branches.
        """
        branch_index = self.calls_at_index
        check_conditioning(self._conditioning_of(call), self.conditioning, branch_index, self.index)
        if branch_index > 0:
            assert self.velocities is not None
            return self.velocities[branch_index], None
        rank = parallel.layout.cfg.rank
        # Latents, time and a ControlNet's residuals are the present ones; pipelines give both branches the same.
        mine = self.bound.family.calls.read(call.inputs._replace(**self.conditioning[rank]))
        if not self.bound.config.rule.is_cached:
            with self.bound.steps.traceable():
                velocities, record = self._step()(mine.inputs), None
        else:
            self._learn_guidance(call.latents)
            branch = self.branches[rank if len(self.branches) > 1 else 0]
            self.branches = [branch]
            self._steer(branch, mine)
            coupling = self.alone._replace(weight=weigh(self.guidance_scale, self.alone.weight)[rank])
            velocities, record = self._run(branch, mine.inputs, coupling)
        check_votes(record, self.index)
        self.velocities = velocities
        return velocities[0], record

    def _take_alone(self, call: Call) -> tuple[Tensor, StepRecord | None]:
        """One call for one guidance branch."""
        if not self.bound.config.rule.is_cached:
            with self.bound.steps.traceable():
                return self._own(self._step()(call.inputs)), None
        branch_index = self.calls_at_index
        if branch_index == len(self.branches):
            self.branches.append(BranchCalls(self._empty_state(call)))
        branch = self.branches[branch_index]
        self._steer(branch, call)
        if branch_index == 0:
            self._learn_guidance(call.latents)
        coupling = self._lead() if branch_index == 0 else self._follow(branch)
        velocity, record = self._run(branch, call.inputs, coupling)
        velocity, branch.has_history = self._own(velocity), True
        if branch_index == 0:
            self.coupling = follow(coupling, record)
        if self._position == 0:
            self.first_latents, branch.velocity = call.latents, velocity
        return velocity, record

    def _own(self, velocity: Tensor) -> Tensor:
        """The velocity of a call in which all ranks computed the same guidance branch."""
        return velocity if self.bound.parallel is None else velocity[0]

    def _step(self) -> CompiledStep:
        return self.bound.steps.get(self.corrects, self.kernel_name)

    def _run(self, branch: BranchCalls, inputs: Any, coupling: Coupling) -> tuple[Tensor, StepRecord]:
        """A branch's next call, after which its state is the next one; the first two check guards, then a state is our own."""
        branch.calls += 1
        step, arguments = self._step(), (inputs, branch.state, self.schedule[self._position], coupling)
        with self.bound.steps.traceable():
            if branch.calls > _GUARDED_CALLS and branch.unguarded is None:
                branch.unguarded = step.without_guards(*arguments)
            velocity, branch.state, record = (branch.unguarded or step)(*arguments)
        return velocity, record

    def _steer(self, branch: BranchCalls, call: Call) -> None:
        steering = steering_of(call.structure, call.conditions, call.is_controlled, self.bound.controls())
        branch.steer(steering)

    def _empty_state(self, call: Call) -> CacheState:
        """Of a guidance branch, on this rank."""
        batch, img_seq, _ = call.latents.shape
        sizes, parallel = self.bound.steps.sizes, self.bound.parallel
        shards = 1 if parallel is None else parallel.layout.sequence.whole.size
        shape = StateShape(batch, img_seq, sizes.dim, call.prefix_length, sizes.num_blocks, shards)
        return empty_state(shape, config=self.bound.config, dtype=call.latents.dtype, device=call.latents.device)

    def _forget_other_weights(self, call: Call) -> None:
        """Start again where a callback has switched or rescaled adapters: the history is another model's."""
        adapted = self.bound.weights.adapted()
        if adapted != self.adapted:
            self.adapted = adapted
            for branch in self.branches:
                branch.forget(self._empty_state(call))

    def _learn_guidance(self, latents: Tensor) -> None:
        """At the second step: infer the guidance scale from the first step that the scheduler took."""
        if self.first_latents is None or self._position == 0:
            return
        if len(self.branches) == 2:
            first, second = (branch.velocity for branch in self.branches)
            assert first is not None
            assert second is not None
            channels = first.shape[-1]
            before = self.first_latents[..., :channels].to(torch.float32)
            sigma, sigma_next = self.sigmas[self.first_index], self.sigmas[self.first_index + 1]
            length = (sigma_next - sigma).abs()
            step = (latents[..., :channels].to(torch.float32) - before) / (sigma_next - sigma)
            rounding = torch.finfo(latents.dtype).eps * before.square().sum((1, 2)).sqrt() / length
            self.guidance_scale = infer_guidance(step, first, second, rounding=rounding)
        self.first_latents = None
        for branch in self.branches:
            branch.velocity = None

    def _lead(self) -> Coupling:
        """What the leading branch needs to decide for all."""
        leader, *followers = self.branches
        coupling, weights = self.alone, weigh(self.guidance_scale, self.alone.weight)
        if followers:
            schedule, config = self.schedule[self._position], self.bound.config
            others = sum(predict_error(branch.state, schedule, config=config) for branch in followers)
            weight, others_weight = weights
            coupling = coupling._replace(weight=weight, others_error=others_weight * others)
        if self.foresight is None:
            return coupling
        states = [branch.state for branch in self.branches]
        return self.foresight.for_leader(self._position, coupling, states, weights, has_history=leader.has_history)

    def _follow(self, branch: BranchCalls) -> Coupling:
        """The other branches do what the leader did."""
        assert self.coupling is not None
        if self.foresight is None:
            return self.coupling
        return self.foresight.for_follower(self.coupling, has_history=branch.has_history)

    def _conditioning_of(self, call: Call) -> dict[str, Any]:
        return {name: getattr(call.inputs, name) for name in self.bound.family.calls.of_branches}

    def _describe(self, call: Call) -> dict[str, Any]:
        """What must be equal on all ranks that draw one image, by the names that a user knows.

        A rank that has a guidance branch more than another is at its second branch while that one is at its second step.
        """
        return {
            BRANCHES: 10 * self._position + self.calls_at_index,
            **self.bound.family.calls.describe(call.inputs, is_later=self._position > 0),
            "step counts (scheduler.sigmas)": self.sigmas,
            "settings (CacheConfig)": zlib.crc32(repr(self.settings).encode()),
            "adapters (LoRA, their scales)": zlib.crc32(repr(self.adapted).encode()),
        }
