"""Rotary position embedding as FLUX applies it: neighbouring channels form the rotated pairs."""

import torch
from jaxtyping import Float
from torch import Tensor

from afcache._typing import Heads, typed


@typed
def apply_rotary_emb(x: Heads, cos: Float[Tensor, "seq head_dim"], sin: Float[Tensor, "seq head_dim"]) -> Heads:
    """Rotate each channel pair of every head by its position's angle.

    (x_0, x_1) -> (x_0 cos - x_1 sin, x_1 cos + x_0 sin), computed in float32.

    Args:
        x: queries or keys.
        cos: cosines, each repeated for the two channels of its pair; float32.
        sin: sines, laid out alike; float32.

    Returns:
        a fresh tensor in the dtype of `x`.
    Reference:
        Su et al., 2021, arXiv 2104.09864, equation 34.

    """
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return (x.to(torch.float32) * cos + turned.to(torch.float32) * sin).to(x.dtype)
