"""Guidance branches of one image: what each holds between its calls, and how they weigh in a decision."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from afcache.functional.continuity import is_elsewhere
from afcache.functional.state import CacheState, Trail
from afcache.functional.update import restart
from afcache.runtime.switches import Steering, is_switched, is_unchanged

# What ranks have in common if they have the same guidance branches.
BRANCHES = "numbers of guidance branches (true_cfg_scale, negative prompts)"


@dataclass(eq=False)
class BranchCalls:
    """What one guidance branch holds, or all of those that share a call.

    Attributes:
        states: the present value of each.
        velocities: what their last call returned.
        calls: how many there were of each kind: computed, cached, or None where one step is both.
        unguarded: the compiled step of each kind without guards, once they have been checked often enough.
        steering: what steered its last call.
        is_constant: whether its last two calls were given the very same tensors to be steered by; presumed before two.
        has_history: whether it certainly has one.
        last_step: the step of its last call.

    """

    states: tuple[CacheState, ...]
    velocities: tuple[Tensor, ...] = ()
    calls: dict[bool | None, int] = field(default_factory=dict)
    unguarded: dict[bool | None, Callable[..., Any]] = field(default_factory=dict)
    steering: Steering | None = None
    is_constant: bool = True
    has_history: bool = False
    last_step: int = -1

    def forget(self, states: tuple[CacheState, ...]) -> None:
        """Start again with other states, whose next calls check all guards."""
        self.states, self.calls, self.unguarded, self.has_history = states, {}, {}, False

    def restart(self, is_restarted: Tensor) -> None:
        """Let samples, bool `[batch]` or 0-d, begin anew."""
        self.states = tuple(restart(state, is_restarted) for state in self.states)

    def steer(self, steering: Steering, *, is_foreseen: bool) -> Tensor | None:
        """Start again where the branch is steered otherwise than at its last call: its history is another field's.

        Args:
            steering: of this call.
            is_foreseen: whether the host must know it: it waits for the device then, where the call leaves it open.

        Returns:
            whether it started again, 0-d; None where it certainly did not.

        """
        before, self.steering = self.steering, steering
        if before is None:
            return None
        self.is_constant = is_unchanged(before, steering)
        if before.structure != steering.structure:
            self.calls, self.unguarded = {}, {}
        switched = is_switched(before, steering)
        if switched is None or (is_foreseen and not bool(switched)):
            return None
        self.restart(switched)
        self.has_history = False
        return switched


def states_of(branches: list[BranchCalls]) -> list[CacheState]:
    """The states of all guidance branches, in order."""
    return [state for branch in branches for state in branch.states]


def find_branch(branches: list[BranchCalls], steering: Steering, *, step: int, count: int = 1) -> BranchCalls | None:
    """The branch that calls: one that is steered by the very same tensors, else the next in order.

    Pipelines hand the same tensors over from step to step. Where a branch did so far, a call with others is by somebody else (a
    preview or a metric in a callback), or its prompt was exchanged: neither goes on with its history.

    Args:
        branches: of the last step, in order of their calls there.
        steering: of the call.
        step: that is being taken.
        count: how many of the guidance branches share the call.

    Returns:
        None if the call is none of theirs.
    Cost:
        waits for the device where a branch that was always given the same tensors may have been given others.

    """
    waiting = [branch for branch in branches if branch.last_step != step and len(branch.states) == count]
    open_branches = [branch for branch in waiting if branch.steering is not None]
    for branch in open_branches:
        assert branch.steering is not None
        if is_unchanged(branch.steering, steering):
            return branch
    for branch in open_branches:
        assert branch.steering is not None
        if not branch.is_constant:
            return branch
        if branch.steering.structure == steering.structure:
            switched = is_switched(branch.steering, steering)
            if switched is None or not bool(switched):
                return branch
    return None


def trails_of(branches: list[BranchCalls]) -> tuple[Trail, ...]:
    """Where the branches of a step lead."""
    return tuple(state.trail for state in states_of(branches) if state.trail is not None)


def find_strays(branches: list[BranchCalls], latents: Tensor, sigma: Tensor) -> Tensor | None:
    """Which samples are not where the branches' last step led; bool `[batch]`, or None where nothing is known of that.

    Args:
        branches: of the last step, the leader first.
        latents: of this one.
        sigma: its noise level, 0-d.

    """
    trails = trails_of(branches)
    return is_elsewhere(latents, trails, sigma) if trails and branches[0].has_history else None


def check_conditioning(now: dict[str, Any], at_first: list[dict[str, Any]], branch: int, step: int) -> None:
    """Raise unless a guidance branch is conditioned on what it was at the first step.

    Args:
        now: conditioning of the call.
        at_first: of every branch, at the first step.
        branch: which one calls, in order.
        step: position in the schedule.

    Raises:
        RuntimeError: there are fewer or more branches than at the first step, or one has another prompt.

    """
    if len(at_first) != 2 or branch >= len(at_first):
        raise RuntimeError(
            "cfg_degree=2 shares out the two branches of true CFG, but the pipeline called the transformer "
            f"{len(at_first)} times at its first step. Pass true_cfg_scale above 1 and a negative_prompt, or use cfg_degree=1."
        )
    for name, value in now.items():
        if not _is_equal(value, at_first[branch][name]):
            raise RuntimeError(
                f"{name} of guidance branch {branch} changed at step {step}, which cfg_degree=2 does not "
                "support: another rank computes the branch. Leave prompts alone in callbacks, or use cfg_degree=1."
            )


def _is_equal(now: Any, then: Any) -> bool:
    if isinstance(now, tuple):
        return len(now) == len(then) and all(map(_is_equal, now, then))
    return now is then or (isinstance(now, Tensor) and isinstance(then, Tensor) and torch.equal(now, then))
