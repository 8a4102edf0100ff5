"""One image's way through a schedule where several ranks draw it together."""

import zlib
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from afcache.functional.continuity import is_elsewhere, trail_of
from afcache.functional.guidance import weigh
from afcache.functional.state import StepRecord, Trail
from afcache.models.family import Call, CallsOfRanks
from afcache.parallel.agreement import adopt_first, check_same_task, check_votes
from afcache.parallel.groups import ParallelContext
from afcache.runtime.branches import BRANCHES, BranchCalls, check_conditioning, states_of
from afcache.runtime.notes import Restart, Role
from afcache.runtime.trajectory import Trajectory


@dataclass
class Together(Trajectory):
    """A trajectory of several ranks: they compare what they draw, and may share out its guidance branches.

    Attributes:
        conditioning: in what the first step's inputs of every branch differ, where other ranks compute some of them.
        paths: where the branches of the present step lead, where states hold a share of the tokens and know only that.

    """

    conditioning: list[dict[str, Any]] = field(default_factory=list)
    paths: list[Trail] = field(default_factory=list)

    @property
    def trails(self) -> tuple[Trail, ...]:
        """Where the branches of the present step lead."""
        return tuple(self.paths) if self._holds_shares else super().trails

    def begin_call(self, call: Call, index: int) -> None:
        """Find at which step a call is, and begin anew what is not where the last step led."""
        is_next = index != self.index
        super().begin_call(call, index)
        if not is_next or not self._holds_shares:
            return
        if self.paths:
            astray = is_elsewhere(call.latents, self.trails, self.schedule[self._position].sigma)
            self.restarts.append(Restart(index, "latents", astray))
            for branch in self._known_branches():
                branch.restart(astray)
        self.paths = []

    def take(self, call: Call) -> tuple[Tensor, StepRecord | None, Role]:
        """The velocity of one call of several ranks, which compare what they are about to draw."""
        parallel = self.bound.parallel
        assert parallel is not None
        velocity, record, role = self._take_together(call, parallel)
        if self._holds_shares and role != "joins" and (self.velocities is None or role == "leads"):
            velocities = [velocity] if self.velocities is None else self.velocities.unbind()
            schedule = self.schedule[self._position]
            self.paths += [trail_of(call.latents, each, schedule) for each in velocities]
        return velocity, record, role

    def _take_together(self, call: Call, parallel: ParallelContext) -> tuple[Tensor, StepRecord | None, Role]:
        branch, is_first = self.calls_at_index, self._position == 0
        # Guidance scales show at the second step, and that a rank has a branch more than others.
        is_second = self._position == 1 and branch == 0
        if is_first or is_second or (parallel.layout.checks and branch == 0):
            check_same_task(parallel, self._describe(call))
        if parallel.splits_guidance and not is_first:
            return self._take_split(call, parallel)
        if parallel.splits_guidance:
            self.conditioning.append(self._conditioning_of(call))
        velocity, record, role = self._take_one_of_pair(call) if self._holds_pair else self._take_alone(call)
        check_votes(record, self.index)
        return velocity, record, role

    @property
    def _holds_shares(self) -> bool:
        """Whether each rank remembers its share of the tokens, or of the branches."""
        return self.bound.config.rule.is_cached and not self.bound.config.forecasts_output

    @property
    def _holds_pair(self) -> bool:
        """Whether every rank forecasts both guidance branches, of which it computes one."""
        parallel, config = self.bound.parallel, self.bound.config
        assert parallel is not None
        return parallel.splits_guidance and config.forecasts_output and config.rule.is_cached

    def _take_one_of_pair(self, call: Call) -> tuple[Tensor, StepRecord, Role]:
        """A branch's call at the first step, where every rank computes all, by the graph that takes both of them at once."""
        branch = BranchCalls(self._empty_states(call, 1))
        self.branches.append(branch)
        self._steer(branch, self._steering(call))
        pair = *branch.states, *self._empty_states(call, 1)
        coupling = self._lead(self.branches[0], [])
        velocities, (state, _), record, _ = self._step_from(pair, self.branches[0], call, coupling)
        branch.states, branch.velocities = (state,), (velocities[0],)
        return velocities[0], record, "leads" if len(self.branches) == 1 else "follows"

    def _take_split(self, call: Call, parallel: ParallelContext) -> tuple[Tensor, StepRecord | None, Role]:
        """One call for all guidance branches: this rank computes its own, and the others' velocities come with it.

        What a branch is conditioned on was seen at the first step, at which every rank computed all branches.
        """
        branch_index = self.calls_at_index
        check_conditioning(self._conditioning_of(call), self.conditioning, branch_index, self.index)
        if branch_index > 0:
            assert self.velocities is not None
            return self.velocities[branch_index], None, "follows"
        rank = parallel.layout.cfg.rank
        # Latents, time and a ControlNet's residuals are the present ones; pipelines give both branches the same.
        calls = [self._ranks.read(call.inputs._replace(**its)) for its in self.conditioning]
        mine = calls[rank]
        if not self.bound.config.rule.is_cached:
            with self.bound.steps.traceable():
                velocities, record = self._step()(mine.inputs), None
        elif self._holds_pair:
            self._learn_guidance(call.latents)
            for branch, its in zip(self.branches, calls, strict=True):
                self._steer(branch, self._steering(its))
            pair = tuple(states_of(self.branches))
            coupling = self._lead(self.branches[0], self.branches[1:])
            velocities, pair, record, _ = self._step_from(pair, self.branches[0], mine, coupling)
            for branch, state in zip(self.branches, pair, strict=True):
                branch.states = (state,)
        else:
            self._learn_guidance(call.latents)
            branch = self.branches[rank if len(self.branches) > 1 else 0]
            self.branches = [branch]
            self._steer(branch, self._steering(mine))
            scale = self._known_scale(rank, branch)
            coupling = self.alone._replace(weight=weigh(scale, config=self.bound.config)[rank])
            velocities, record, _ = self._run(branch, mine, coupling)
        check_votes(record, self.index)
        self.velocities = velocities
        return velocities[0], record, "leads"

    def _learn_guidance(self, latents: Tensor) -> None:
        """Once an image: the first rank's scale, which ranks that decide alike must know to the last bit."""
        before = self.guidance.scale
        super()._learn_guidance(latents)
        if self.guidance.scale is not None and self.guidance.scale is not before:
            assert self.bound.parallel is not None
            self.guidance.scale = adopt_first(self.bound.parallel, self.guidance.scale)

    def _known_scale(self, place: int, branch: BranchCalls) -> Tensor:
        """The guidance scale per sample; branches of ranks that share them out stay a pair."""
        parallel = self.bound.parallel
        assert parallel is not None
        if parallel.splits_guidance and self.guidance.scale is not None:
            return self.guidance.scale
        return super()._known_scale(place, branch)

    def _conditioning_of(self, call: Call) -> dict[str, Any]:
        return {name: getattr(call.inputs, name) for name in self._ranks.of_branches}

    @property
    def _ranks(self) -> CallsOfRanks:
        assert self.bound.family.calls.of_ranks is not None
        return self.bound.family.calls.of_ranks

    def _describe(self, call: Call) -> dict[str, Any]:
        """What must be equal on all ranks that draw one image, by the names that a user knows.

        A rank that has a guidance branch more than another is at its second branch while that one is at its second step.
        """
        return {
            BRANCHES: 10 * self._position + self.calls_at_index,
            **self._ranks.describe(call.inputs, is_later=self._position > 0),
            "step counts (scheduler.sigmas)": self.sigmas,
            "settings (CacheConfig)": zlib.crc32(repr(self.settings).encode()),
            "adapters (LoRA, their scales)": zlib.crc32(repr(self.adapted).encode()),
        }
