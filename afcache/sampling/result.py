"""What `denoise` returns, checkpoints keep, and `denoise` goes on with."""

from typing import NamedTuple

from afcache._typing import Latents
from afcache.functional.state import CacheState, StepRecord
from afcache.sampling.origin import Origin
from afcache.settings.config import Target


class Denoised(NamedTuple):
    """A trajectory, finished or up to some step.

    Attributes:
        latents: at the noise level that was reached, `[batch, img_seq, channels]`.
        states: one for each guidance branch.
        records: for each step, one record for each guidance branch.
        target: what the states' histories keep (`CacheConfig.target`).
        origin: what it is of; None where somebody made it by hand, and then nobody asks.

    """

    latents: Latents
    states: tuple[CacheState, ...]
    records: list[tuple[StepRecord, ...]]
    target: Target
    origin: Origin | None = None

    def pattern(self, sample: int = 0) -> str:
        """One letter per step: F computed, "." forecast."""
        return "".join("F" if bool(leader.refresh[sample]) else "." for leader, *_ in self.records)
