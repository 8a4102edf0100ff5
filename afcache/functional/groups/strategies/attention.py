"""Low stability: reuse the attention outputs while the group attends where it did, and compute its MLPs."""

from afcache._typing import AttentionMap, PerSample, typed
from afcache.functional.distance import total_variation
from afcache.functional.groups.proposal import Memory, Proposal


@typed
def attention(memory: Memory, attention_map: AttentionMap, *, threshold: PerSample) -> Proposal:
    """Propose the last attention outputs; valid while the coarse attention map's total variation distance < threshold.

    Args:
        memory: of the group.
        attention_map: its first block's present coarse map, rows summing to 1.
        threshold: in [0, 1]; 0 is never valid.

    Returns:
        the residual is the last one: an estimate, for who cannot run the MLPs.
    Reference:
        Yuan et al., 2024, DiTFastAttn, arXiv 2406.08552, shares attention outputs across steps by an offline plan; here it
        is decided at run time.

    """
    distance = total_variation(attention_map, memory.attention_map)
    return Proposal(memory.history[0], (distance < threshold) & (memory.num_nodes > 0), distance, threshold)
