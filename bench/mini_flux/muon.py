"""Muon in float32, for the block matrices of the small models; kernels of convolutions count as `[out, in * size]`.

torch.optim.Muon orthogonalises in bfloat16, which has no native instructions on most CPUs and made a step more than
twice as slow. Matrices of one shape are orthogonalised together.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: torch.Tensor, *, steps: int = 5) -> torch.Tensor:
    """Push the singular values of `[count, rows, columns]` towards 1 by a quintic Newton-Schulz iteration.

    Reference:
        Jordan et al., 2024, "Muon: An optimizer for hidden layers in neural networks".
    """
    a, b, c = _COEFFICIENTS
    transposed = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if transposed else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised per matrix; the update's size is that of AdamW (0.2 * sqrt(larger side))."""

    def __init__(self, params: Iterable[torch.nn.Parameter], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply one update with Nesterov momentum."""
        del closure
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    by_shape[param.shape].append(param)
            for shape, params in by_shape.items():
                for param in params:
                    if "momentum" not in self.state[param]:
                        self.state[param]["momentum"] = torch.zeros_like(param)
                # Together, since on a GPU the starts of so many small kernels are what a step waits for.
                gradients: list[Any] = [param.grad for param in params]
                buffers = [self.state[param]["momentum"] for param in params]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                updates = torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"])).flatten(2)
                scale = 0.2 * max(updates.shape[1:]) ** 0.5
                directions = orthogonalize(updates).reshape(-1, *shape).unbind()
                torch._foreach_add_(params, list(directions), alpha=-group["lr"] * scale)
