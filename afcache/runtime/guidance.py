"""The true CFG scale of an image, as the steps that its scheduler takes show it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from afcache.functional.guidance import infer_guidance
from afcache.functional.process import mean_output
from afcache.functional.state import StepSchedule
from afcache.runtime.branches import BranchCalls


@dataclass
class Guidance:
    """What is known of how two guidance branches are joined.

    Attributes:
        scale: per sample; NaN where no scale explains the step that was taken; None without two branches.
        pair: whose scale it is: two branches, or one call of both.

    """

    scale: Tensor | None = None
    pair: list[BranchCalls] = field(default_factory=list)

    def forget(self) -> None:
        """One number says nothing of three branches."""
        self.scale, self.pair = None, []

    def learn(self, branches: list[BranchCalls], before: Tensor, after: Tensor, schedule: StepSchedule) -> None:
        """Infer the scale from the first step of a pair of branches that the scheduler took.

        Args:
            branches: of the last step.
            before, after: latents on either side of it.
            schedule: of that step.

        """
        velocities = [velocity for branch in branches for velocity in branch.velocities]
        if len(velocities) != 2 or branches == self.pair:
            return
        first, second = velocities
        self.scale = guidance_of_step(before, after, schedule, velocities=(first, second))
        self.pair = list(branches)

    def known(self, branches: list[BranchCalls], place: int, branch: BranchCalls) -> Tensor | None:
        """The scale, for the first or second branch of the last step; None where it is unknown."""
        return self.scale if branches == self.pair and self.pair[place : place + 1] == [branch] else None


def guidance_of_step(before: Tensor, after: Tensor, schedule: StepSchedule, *, velocities: tuple[Tensor, Tensor]) -> Tensor:
    """The guidance scale of the step that a scheduler took, per sample; NaN where none explains it.

    Args:
        before, after: latents on either side of the step.
        schedule: of the step.
        velocities: of both branches.

    """
    step, length = mean_output(before, after, schedule.sigma_next - schedule.sigma, process=schedule.process)
    rounding = torch.finfo(after.dtype).eps * before.to(torch.float32).flatten(1).norm(dim=1) / length.abs()
    return infer_guidance(step, *velocities, rounding=rounding)
