"""Computational noise: what rounding alone changes between two evaluations of a model.

A model that rounds its activations (to int8, to float8) is a smooth function plus jitter: two inputs that hardly differ
give outputs that differ by a fixed amount, however near the inputs are. A refresh finds that amount in every measured error.
It does not grow with the distance in sigma and no refresh makes it smaller, so it must not count as change.
"""

import math

import torch
from torch import Tensor

from afcache._typing import PerSample, Setting, typed


@typed
def computational_noise(velocities: list[Tensor]) -> PerSample:
    """The relative standard deviation of a model's jitter, of its values at equidistant points on a line.

    sigma_k^2 = (k!)^2 / (2k)! mean (Delta^k v)^2,  k = len(velocities) - 1;  relative to the mean square of v

    The k-th difference of the smooth part vanishes with the k-th power of the distance; that of independent errors does
    not, and has (2k)! / (k!)^2 times their variance.

    Args:
        velocities: v at k + 1 equidistant points, each `[batch, img_seq, channels]`; k = 4 tells noise of 0.01 % from smooth
            change at a distance of 3 % of the input.

    Returns:
        float32.
    Reference:
        More, Wild, 2011, "Estimating computational noise", SIAM J. Sci. Comput. 33, after Hamming's difference tables. Ours
        averages over the entries of a vector where theirs averages over a table of scalars.

    """
    order = len(velocities) - 1
    difference = torch.zeros_like(velocities[0], dtype=torch.float32)
    for index, velocity in enumerate(velocities):
        difference = difference + (-1) ** index * math.comb(order, index) * velocity.to(torch.float32)
    signal = velocities[order // 2].to(torch.float32).square().flatten(1).mean(1)
    return (difference.square().flatten(1).mean(1) / math.comb(2 * order, order) / signal).sqrt()


@typed
def above_floor(measured: PerSample, floor: Setting) -> PerSample:
    """What of a measured relative change rounding does not explain: sqrt(max(0, measured^2 - floor^2)).

    Independent errors add in squares. NaN and infinity stay what they are.

    Args:
        measured: relative difference of two evaluations, or of a forecast and an evaluation.
        floor: relative difference that rounding alone makes between two evaluations; 0 changes nothing.

    """
    above = (measured.square() - floor.square()).clamp(min=0).sqrt()
    return torch.where((floor > 0) & torch.isfinite(measured), above, measured)
