"""The values that are threaded through the denoising steps: tensors only, fixed shapes from step zero."""

from typing import NamedTuple

import torch
from torch import Tensor


class CacheState(NamedTuple):
    """What one guidance branch remembers between steps. A value: each step returns a new one.

    Only a step that was given a `writer` ends the life of the state that it read (see `cached_forward`).

    Attributes:
        history: residuals (stack output - stack input) of the image tokens at the last refreshes, newest first; not
            corrected; `[nodes, batch, img_seq, dim]` in the model's dtype.
        nodes: their sigmas, newest first; float32 `[nodes, batch]`.
        steps: their step indices, newest first; float32 `[nodes, batch]`.
        num_nodes: how many of them are filled; int64 `[batch]`.
        error_rate: c = e / g of the last measurement; infinite until there is one; float32 `[batch]`.
        error_order: order of the row that was measured; int64 `[batch]`.
        accumulated_error: predicted contributions since the last refresh; relative velocity error times sigma; float32
            `[batch]`.
        last_gap: distance in sigma between the last two refreshes; 0 until there are two; float32 `[batch]`.
        lag: sum of (sigma_{j+1} - sigma_j) g(sigma_j) over the forecast steps since the last refresh; float32 `[batch]`.

    """

    history: Tensor
    nodes: Tensor
    steps: Tensor
    num_nodes: Tensor
    error_rate: Tensor
    error_order: Tensor
    accumulated_error: Tensor
    last_gap: Tensor
    lag: Tensor


class StepSchedule(NamedTuple):
    """Where a step stands. All 0-d tensors: a Python number that changes would recompile at every value.

    Attributes:
        sigma: noise level of the step; float32.
        sigma_next: noise level after it; float32.
        step_index: steps done before this one in the trajectory; int64.
        num_steps: steps of the trajectory; int64.
        tolerance: limit of the accumulated error; float32.

    """

    sigma: Tensor
    sigma_next: Tensor
    step_index: Tensor
    num_steps: Tensor
    tolerance: Tensor


class Coupling(NamedTuple):
    """How a guidance branch shares the decision of its step with the others.

    The branch that is called first leads: it decides for all, from all predicted errors.

    Attributes:
        is_follower: 0-d bool; a follower adopts `leader_refresh`.
        leader_refresh: the leader's decision; bool `[batch]`; unused by the leader.
        weight: factor of the leader's own predicted error, |s| under guidance scale s, else 1; float32 `[batch]`.
        others_error: weighted sum of the other branches' predicted errors; float32 `[batch]`.

    """

    is_follower: Tensor
    leader_refresh: Tensor
    weight: Tensor
    others_error: Tensor


class StepRecord(NamedTuple):
    """What a step did, for the report; read by the host at the end only.

    Attributes:
        refresh: the decision per sample; bool `[batch]`.
        is_computed: the block stack ran; bool, 0-d.
        predicted_error: relative velocity error expected of this step's forecast; float32 `[batch]`.
        measured_error: the error that a refresh found; NaN on other steps and before the first forecast; float32 `[batch]`.
        accumulated_error: the estimate after this step, 0 after a refresh; the leading branch's is the guided velocity's, the
            others' are their own; float32 `[batch]`.

    """

    refresh: Tensor
    is_computed: Tensor
    predicted_error: Tensor
    measured_error: Tensor
    accumulated_error: Tensor


def init_state(
    batch: int,
    img_seq: int,
    dim: int,
    *,
    order: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> CacheState:
    """Make the empty state of one guidance branch.

    Args:
        batch, img_seq, dim: shape of the image tokens inside the transformer.
        order: order of the forecast; order + 1 residuals are kept.
        dtype: of the residuals; statistics are float32.
        device: where everything lives.
    Cost:
        (order + 1) * batch * img_seq * dim elements of `dtype`.

    """
    nodes = order + 1
    zeros = torch.zeros(batch, dtype=torch.float32, device=device)
    counts = torch.zeros(batch, dtype=torch.int64, device=device)
    return CacheState(
        history=torch.zeros(nodes, batch, img_seq, dim, dtype=dtype, device=device),
        nodes=torch.zeros(nodes, batch, dtype=torch.float32, device=device),
        steps=torch.zeros(nodes, batch, dtype=torch.float32, device=device),
        num_nodes=counts,
        error_rate=torch.full_like(zeros, float("inf")),
        error_order=counts.clone(),
        accumulated_error=zeros,
        last_gap=zeros.clone(),
        lag=zeros.clone(),
    )


def check_state(state: CacheState, *, batch: int, img_seq: int, dim: int, order: int) -> None:
    """Raise unless every field has the shape and dtype that the step expects.

    Raises:
        TypeError: a field is not a tensor.
        ValueError: a field has the wrong shape or dtype; the message names it.

    """
    expected = init_state(batch, img_seq, dim, order=order, device="meta")
    for name, value, model in zip(CacheState._fields, state, expected, strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"CacheState.{name} must be a tensor, got {type(value).__name__}. Start from init_state.")
        if value.shape != model.shape:
            raise ValueError(
                f"CacheState.{name} has shape {tuple(value.shape)}, expected {tuple(model.shape)} for batch={batch}, "
                f"img_seq={img_seq}, dim={dim}, order={order}. A new shape needs a new state from init_state."
            )
        if name != "history" and value.dtype != model.dtype:
            raise ValueError(f"CacheState.{name} must be {model.dtype}, got {value.dtype}.")


def state_bytes(state: CacheState) -> int:
    """The memory that a state holds, in bytes."""
    return sum(field.numel() * field.element_size() for field in state)


def solo(batch: int, *, device: torch.device | str = "cpu") -> Coupling:
    """The coupling of a trajectory without guidance branches: the one branch leads and weighs 1."""
    zeros = torch.zeros(batch, dtype=torch.float32, device=device)
    return Coupling(
        is_follower=torch.zeros((), dtype=torch.bool, device=device),
        leader_refresh=torch.zeros(batch, dtype=torch.bool, device=device),
        weight=torch.ones_like(zeros),
        others_error=zeros,
    )


def schedule_steps(sigmas: Tensor, *, tolerance: float) -> list[StepSchedule]:
    """Take a trajectory's schedule apart into its steps, once, so that no step has to make tensors of numbers.

    Args:
        sigmas: noise levels, one more than steps; `[steps + 1]`; used in float32.
        tolerance: limit of the accumulated error.

    """
    num_steps = len(sigmas) - 1
    # Each level has memory of its own: views of one tensor would be misaligned inputs of a compiled step.
    levels = [sigma.clone() for sigma in sigmas.to(torch.float32).unbind()]
    indices = [index.clone() for index in torch.arange(num_steps, device=sigmas.device).unbind()]
    total = torch.tensor(num_steps, device=sigmas.device)
    limit = torch.tensor(tolerance, dtype=torch.float32, device=sigmas.device)
    return [StepSchedule(levels[i], levels[i + 1], indices[i], total, limit) for i in range(num_steps)]
