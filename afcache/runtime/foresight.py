"""Decisions that the host knows before their step is launched: it reads them once a refresh, not once a step.

`torch.cond` takes its predicate from the host's memory as well. What is forced is known from the start. What error control
decides is known once a refresh has measured its error, for all steps up to the next refresh: one table of flags is made on the
device, and read once. The step adopts its row, so that host and device act on the same bits.
"""

import torch
from torch import Tensor

from afcache._typing import unchecked
from afcache.functional.decision import foresee
from afcache.functional.plans import forced_steps, stack_steps
from afcache.functional.state import CacheState, Coupling, StepSchedule
from afcache.runtime.branches import BranchCalls, states_of
from afcache.settings.config import CacheConfig


class Foresight:
    """The decisions of one image, as far as they are known.

    Args:
        config: settings.
        schedule: the steps.

    """

    def __init__(self, config: CacheConfig, schedule: list[StepSchedule]) -> None:
        self._config = config
        self._schedule = schedule
        self._forced = forced_steps(config, len(schedule))
        self._rows: dict[int, tuple[Tensor, bool]] = {}
        self._branches: list[BranchCalls] = []

    def for_leader(
        self,
        position: int,
        coupling: Coupling,
        branches: list[BranchCalls],
        weights: tuple[Tensor, Tensor],
    ) -> Coupling:
        """The leading branch's coupling with what the host knows of its decision.

        Args:
            position: of the step, counted from the first that is walked.
            coupling: without that.
            branches: all guidance branches, the leader first; until it certainly has a history, steps are computed, whatever
                the device decides.
            weights: of the leader's and of any other branch's predicted error.

        """
        if self._forced[position] or not branches[0].has_history:
            return self._foretell(coupling, is_computed=True)
        if not self._config.rule.is_error_controlled:
            return self._foretell(coupling, is_computed=False)
        # What was foreseen for other branches (guidance that comes or goes, another prompt) is another decision.
        if position not in self._rows or branches != self._branches:
            self._branches = branches
            self._rows = self._foresee(position, states_of(branches), weights)
        refresh, is_computed = self._rows[position]
        adopted = coupling._replace(is_follower=torch.ones_like(coupling.is_follower), leader_refresh=refresh)
        return self._foretell(adopted, is_computed=is_computed)

    def for_stranger(self, coupling: Coupling) -> Coupling:
        """The coupling of a branch that calls before the leader: it computes, and what is foreseen of the others stays."""
        return coupling._replace(known=torch.tensor(True, device="cpu"))

    def for_follower(self, coupling: Coupling, *, has_history: bool) -> Coupling:
        """The coupling of a branch that does what the leader did; without a history it computes."""
        return self._foretell(coupling, is_computed=not has_history or bool(coupling.known))

    def _foretell(self, coupling: Coupling, *, is_computed: bool) -> Coupling:
        """Put a decision into a coupling. A computed step ends what was foreseen."""
        if is_computed:
            self._rows = {}
        return coupling._replace(known=torch.tensor(is_computed, device="cpu"))

    def _foresee(
        self, position: int, states: list[CacheState], weights: tuple[Tensor, Tensor]
    ) -> dict[int, tuple[Tensor, bool]]:
        """Rows from a step on to the first that computes; waits for the device."""
        stacked = stack_steps(self._schedule[position:])
        state, *others = states
        with unchecked():
            flags = foresee(state, tuple(others), stacked, *weights, config=self._config)
        rows: dict[int, tuple[Tensor, bool]] = {}
        for offset, is_computed in enumerate(flags.any(dim=1).tolist()):
            rows[position + offset] = (flags[offset].clone(), is_computed)
            if is_computed:
                break
        return rows
