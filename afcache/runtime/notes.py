"""What a trajectory notes on its way, for the report."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from afcache.functional.state import StepRecord

# What a call was for its step: it decided for all, did what was decided, or came from nobody who was there before.
Role = Literal["leads", "follows", "joins"]
# What began anew: the latents were elsewhere, other prompts or images, other adapters, other noise levels, steps left out.
Reason = Literal["latents", "conditioning", "weights", "schedule", "steps"]

# How what forecasts left out is returned: at the refresh alone, under a solver that remembers nothing; as a solver's response
# asks; or not.
Correction = Literal["step", "solver", "off"]


class TimedCall(NamedTuple):
    """One transformer call of a trajectory, as the report sees it.

    Attributes:
        step: position in the schedule.
        role: what it was for its step.
        record: what the step did, or None under policy "none".
        elapsed: returns seconds; on CUDA it waits for the call's events.

    """

    step: int
    role: Role
    record: StepRecord | None
    elapsed: Callable[[], float]


class Restart(NamedTuple):
    """Samples that began anew.

    Attributes:
        step: position in the schedule.
        reason: why.
        flags: which samples, bool `[batch]` or 0-d, still on the device; None means all.

    """

    step: int
    reason: Reason
    flags: Tensor | None = None
