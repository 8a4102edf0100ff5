"""Very low stability: reuse the group's residual only while its modulated input has hardly changed."""

from afcache._typing import PerSample, Tokens, typed
from afcache.functional.distance import Reduction, no_reduction, relative_l1
from afcache.functional.groups.proposal import Memory, Proposal


@typed
def difference(memory: Memory, modulated: Tokens, *, threshold: PerSample, reduction: Reduction = no_reduction) -> Proposal:
    """Propose the last residual; valid while sum |m - m_n| / sum |m_n| < threshold.

    Args:
        memory: of the group.
        modulated: summary of the present input of its first block, after modulation.
        threshold: 0 is never valid. NaN (nothing is known) is not valid.
        reduction: sums partial sums over ranks.

    Reference:
        Liu et al., 2024, TeaCache, arXiv 2411.19108, equation 4: the timestep-aware difference of inputs; there between
        neighbouring steps and accumulated, here against the last computation.

    """
    distance = relative_l1(modulated, memory.modulated, reduction=reduction)
    return Proposal(memory.history[0], (distance < threshold) & (memory.num_nodes > 0), distance, threshold)
