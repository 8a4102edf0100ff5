"""Muon in float32, for the block matrices of mini-FLUX; kernels of convolutions count as `[out, in * size]` matrices.

torch.optim.Muon orthogonalises in bfloat16, which has no native instructions on most CPUs and made a step more than
twice as slow. Matrices of one shape are orthogonalised together.
"""

from collections import defaultdict
from collections.abc import Iterable

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
                updates = []
                for param in params:
                    buffer = self.state[param].setdefault("momentum", torch.zeros_like(param))
                    buffer.lerp_(param.grad, 1 - group["momentum"])
                    updates.append(param.grad.lerp(buffer, group["momentum"]).flatten(1))
                scale = 0.2 * max(updates[0].shape) ** 0.5
                for param, update in zip(params, orthogonalize(torch.stack(updates)), strict=True):
                    param.add_(update.view(shape), alpha=-group["lr"] * scale)
