"""Medium stability: reuse the group's residual while its input points where it did."""

from afcache._typing import PerSample, Tokens, typed
from afcache.functional.distance import Reduction, cosine_dissimilarity, no_reduction
from afcache.functional.groups.proposal import Memory, Proposal


@typed
def similarity(memory: Memory, inputs: Tokens, *, threshold: PerSample, reduction: Reduction = no_reduction) -> Proposal:
    """Propose the last residual; valid while 1 - cos(input, input at the last computation) < threshold.

    Args:
        memory: of the group.
        inputs: summary of its present input.
        threshold: in [0, 2]; 0 is never valid. NaN (nothing is known) is not valid.
        reduction: sums partial sums over ranks.

    Reference:
        First-block caches compare relative L1 distances instead: ParaAttention's FBCache; cosine similarity as in DeepCache,
        Ma et al., 2023, arXiv 2312.00858, section 3.

    """
    distance = cosine_dissimilarity(inputs, memory.inputs, reduction=reduction)
    return Proposal(memory.history[0], (distance < threshold) & (memory.num_nodes > 0), distance, threshold)
