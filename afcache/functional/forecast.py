"""Forecasters: each is one row of weights over what the last refreshes kept (`afcache.functional.target`).

z_hat = sum_k w_k z_k, newest first. Reuse is the row (1, 0, ..., 0); polynomial extrapolation in sigma, TaylorSeer's
finite differences in step index, and damped mixtures are other rows. One kernel applies any of them.
"""

import torch
from einops import rearrange
from torch import Tensor

from afcache._typing import Counts, History, Kept, Level, Nodes, PerSample, Row, Setting, typed

_CHEBYSHEV_RANGE = 50.0
_CHEBYSHEV_RIDGE = 0.1


@typed
def row_order(num_nodes: Counts, *, order: int) -> Counts:
    """The order that the history allows: min(order, num_nodes - 1), at least 0."""
    return (num_nodes - 1).clamp(0, order)


@typed
def reuse_row(nodes: Nodes) -> Row:
    """(1, 0, ..., 0) for every sample: the forecast of order 0."""
    row = torch.zeros_like(nodes)
    row[0] = 1.0
    return row


@typed
def polynomial_row(nodes: Nodes, num_nodes: Counts, sigma: Level, *, order: int) -> Row:
    """Extrapolate the polynomial through the newest refreshes, at their real, unequal distances.

    w_k = prod_{j != k} (sigma - sigma_j) / (sigma_k - sigma_j): Newton's divided differences in Lagrange's form. Exact
    for polynomials in sigma of degree <= order once order + 1 refreshes are known; of lower order before.

    Args:
        nodes: sigma of the last refreshes, newest first; float32. Equal nodes give non-finite weights.
        num_nodes: how many of them are filled, per sample.
        sigma: where to forecast.
        order: degree; static, at most `nodes` - 1.

    Returns:
        weights; zero beyond the filled nodes (all zero when there is none).

    """
    used = row_order(num_nodes, order=order)
    weights = []
    for k in range(nodes.shape[0]):
        weight = torch.ones_like(nodes[0])
        for j in range(order + 1):
            if j != k:
                factor = (sigma - nodes[j]) / (nodes[k] - nodes[j])
                weight = torch.where(used >= j, weight * factor, weight)
        is_used = (used >= k) & (num_nodes > k)
        weights.append(torch.where(is_used, weight, torch.zeros_like(weight)))
    return torch.stack(weights)


@typed
def taylorseer_row(steps: Nodes, num_nodes: Counts, step_index: Level, *, order: int) -> Row:
    """TaylorSeer's forecast as its authors define it: finite differences in step index, Taylor weights.

    d^0 = r;  d^{i+1}_n = (d^i_n - d^i_{n-1}) / (s_n - s_{n-1});  r_hat = sum_i d^i_n (s - s_n)^i / i!

    Every difference is divided by the distance of the last two refreshes alone, so order 2 and higher are not exact for
    polynomials even at equal distances; `polynomial_row` is.

    Args:
        steps: step index of the last refreshes, newest first; float32.
        num_nodes: how many of them are filled, per sample.
        step_index: where to forecast; float32.
        order: highest difference; static, at most `nodes` - 1.

    Returns:
        weights; zero beyond the filled nodes.
    Reference:
        Liu et al., 2025, arXiv 2503.06923, equation 3.

    """
    count, batch = steps.shape
    identity = torch.eye(count, dtype=steps.dtype, device=steps.device)
    differences = [identity[n][:, None].expand(count, batch) for n in range(count)]
    used = row_order(num_nodes, order=order)
    distance, factorial = step_index - steps[0], 1.0
    row = differences[0]
    for i in range(1, order + 1):
        differences = [(differences[n] - differences[n + 1]) / (steps[n] - steps[n + 1]) for n in range(len(differences) - 1)]
        factorial *= i
        row = torch.where(used >= i, row + differences[0] * distance**i / factorial, row)
    return torch.where(num_nodes > 0, row, torch.zeros_like(row))


@typed
def chebyshev_row(steps: Nodes, num_nodes: Counts, step_index: Level, *, order: int) -> Row:
    """Spectrum's forecast: ridge regression on Chebyshev polynomials of the step index, over all refreshes remembered.

    w = phi(s)^T (Phi^T Phi + lambda I)^{-1} Phi^T,  phi_i(s) = T_i(2 s / 50 - 1)

    The range is 0 to 50 whatever the number of steps, as the authors have it; lambda = 0.1.

    Args:
        steps: step index of the last refreshes, newest first; float32.
        num_nodes: how many of them are filled, per sample.
        step_index: where to forecast; float32.
        order: highest degree; static.

    Returns:
        weights; zero beyond the filled nodes.
    Reference:
        Spectrum, 2026, arXiv 2603.01623. The authors forecast the last block's output; here it is the residual.

    """
    count = steps.shape[0]
    is_filled = torch.arange(count, device=steps.device)[:, None] < num_nodes
    design = _chebyshev_basis(steps, order) * is_filled[..., None].to(steps.dtype)
    design = rearrange(design, "nodes batch degree -> batch nodes degree")
    penalty = _CHEBYSHEV_RIDGE * torch.eye(order + 1, dtype=steps.dtype, device=steps.device)
    target = _chebyshev_basis(step_index.expand_as(steps[0]), order)
    solution = torch.linalg.solve(design.mT @ design + penalty, target)
    return rearrange(design @ solution[..., None], "batch nodes 1 -> nodes batch").contiguous()


def _chebyshev_basis(steps: Tensor, order: int) -> Tensor:
    """T_0 to T_order of the step index scaled to [-1, 1], along a new last axis."""
    x = 2 * steps / _CHEBYSHEV_RANGE - 1
    basis = [torch.ones_like(x), x]
    for _ in range(order - 1):
        basis.append(2 * x * basis[-1] - basis[-2])
    return torch.stack(basis[: order + 1], dim=-1)


@typed
def damp_row(row: Row, *, damping: Setting) -> Row:
    """Move a row towards reuse: (1 - damping) row + damping (1, 0, ..., 0).

    Args:
        row: weights of a forecaster.
        damping: 0 keeps the row, whatever its weights are, 1 is plain reuse.

    """
    return torch.where(damping == 0, row, torch.lerp(row, reuse_row(row), damping))


@typed
def apply_row(row: Row, history: History) -> Kept:
    """z_hat = sum_k w_k z_k, accumulated in float32, returned in the dtype of `history`.

    A node whose weight is zero is left out even if what it keeps is not finite.
    """
    weights = row.reshape(*row.shape, *[1] * (history.ndim - 2))
    total = torch.zeros_like(history[0], dtype=torch.float32)
    for k in range(history.shape[0]):
        term = weights[k] * history[k].to(torch.float32)
        total = total + torch.where(weights[k] == 0, torch.zeros_like(term), term)
    return total.to(history.dtype)


@typed
def push(history: Tensor, newest: Tensor, refresh: Tensor) -> Tensor:
    """Shift `newest` in at the front, for the samples that refresh.

    Args:
        history: `[nodes, batch, ...]`, newest first.
        newest: `[batch, ...]`; cast to the dtype of `history`.
        refresh: bool `[batch]`.

    Returns:
        a fresh tensor.
    Cost:
        one copy of `history`.

    """
    shifted = torch.cat([newest.to(history.dtype)[None], history[:-1]])
    return torch.where(refresh.reshape(1, -1, *[1] * (history.ndim - 2)), shifted, history)


@typed
def gap_to(nodes: Nodes, sigma: Level) -> PerSample:
    """|sigma - sigma_n|: the distance in sigma from the last refresh."""
    return (sigma - nodes[0]).abs()
