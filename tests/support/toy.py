"""A transformer whose velocity is a given function of sigma: closed-form trajectories for the cached step."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from afcache.functional.initial import uncoupled
from afcache.functional.model import Architecture, Embedded, Model, Sizes, scaled_dot_product_attention
from afcache.functional.plans import schedule_steps
from afcache.functional.state import CacheState, Coupling, StepRecord
from afcache.functional.step import HistoryWriter
from afcache.sampling.primitives import cached_forward, init_state
from afcache.settings.config import CacheConfig

# (x [batch, img_seq, channels], sigma [batch]) -> velocity, same shape as x.
VelocityField = Callable[[Tensor, Tensor], Tensor]


class ToyInputs(NamedTuple):
    hidden_states: Tensor
    sigma: Tensor


class Toy:
    """Counts how often its blocks run; the embedding is zero, so the residual is the velocity itself."""

    def __init__(self, field: VelocityField) -> None:
        self.field = field
        self.evaluations = 0


def _embed(toy: Any, inputs: ToyInputs) -> Embedded:
    del toy
    # torch.cond does not take a tensor and a view of it, and sigma may be a view of the schedule's.
    return Embedded(torch.zeros_like(inputs.hidden_states), inputs.sigma[:, None].clone())


def _stack(model: Model, inputs: ToyInputs, embedded: Embedded) -> Tensor:
    toy = model.transformer
    toy.evaluations += 1
    return toy.field(inputs.hidden_states, embedded.temb[:, 0])


def _head(toy: Any, hidden_states: Tensor, temb: Tensor) -> Tensor:
    del toy, temb
    return hidden_states.clone()


def _place(inputs: Any, latents: Tensor, sigma: Tensor) -> ToyInputs:
    del inputs
    return ToyInputs(latents, sigma.expand(latents.shape[0]))


def _sizes(toy: Any) -> Sizes:
    del toy
    return Sizes(num_blocks=1, dim=4, heads=1, channels=4)


def _latents(inputs: ToyInputs) -> Tensor:
    return inputs.hidden_states


TOY = Architecture(sizes=_sizes, embed=_embed, stack=_stack, head=_head, place=_place, latents=_latents)


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors of nested tuples, in order; parts that are None have none."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


class Run(NamedTuple):
    latents: Tensor
    path: list[Tensor]
    records: list[StepRecord]
    states: list[CacheState]

    @property
    def state(self) -> CacheState:
        return self.states[-1]

    def pattern(self, sample: int = 0) -> str:
        return "".join("F" if bool(record.refresh[sample]) else "." for record in self.records)


def sample_toy(
    field: VelocityField,
    sigmas: Tensor,
    config: CacheConfig,
    *,
    latents: Tensor,
    coupling: Coupling | None = None,
    writer: HistoryWriter | None = None,
    each: Sequence[CacheConfig] | None = None,
) -> Run:
    """Euler steps with a cache over a closed-form velocity field, eagerly; `each` is as `schedule_steps` takes it."""
    toy = Toy(field)
    batch, img_seq, channels = latents.shape
    state = init_state(batch, img_seq, channels, config=config, dtype=latents.dtype)
    records, path, states = [], [latents], [state]
    for index in range(len(sigmas) - 1):
        schedule = schedule_steps(sigmas, config, each=each)[index]
        inputs = ToyInputs(latents, schedule.sigma.expand(batch))
        velocity, state, record = cached_forward(
            toy,
            inputs,
            state,
            schedule,
            coupling or uncoupled(batch),
            architecture=TOY,
            kernel=scaled_dot_product_attention,
            config=config,
            writer=writer,
        )
        latents = latents + (schedule.sigma_next - schedule.sigma) * velocity
        records.append(record)
        states.append(state)
        path.append(latents)
    return Run(latents, path, records, states)


def uneven_sigmas(steps: int) -> Tensor:
    """FLUX-like: shifted, so that no two steps are equally long."""
    linear = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (1.6 * linear / (1 + 0.6 * linear)).to(torch.float32)


SIGMAS = uneven_sigmas(28)
LATENTS = torch.linspace(-1, 1, 2 * 3 * 4).reshape(2, 3, 4)


def polynomial_in_sigma(*coefficients: float) -> VelocityField:
    """A velocity that depends on sigma alone: the exact Euler sum is known, and errors do not feed back."""

    def field(x: Tensor, sigma: Tensor) -> Tensor:
        value = sum(c * sigma**i for i, c in enumerate(coefficients))
        return (value * torch.ones_like(sigma))[:, None, None].expand_as(x).contiguous()

    return field


def mixture_flow(x: Tensor, sigma: Tensor) -> Tensor:
    """Velocity of the flow from noise to a two-point mixture at +-1, per coordinate: E[noise - data | x]."""
    s = sigma[:, None, None].clamp(min=1e-3)
    data = torch.tanh(x * (1 - s) / s**2)
    return (x - data) / s


def euler(field: VelocityField, latents: Tensor, sigmas: Tensor = SIGMAS) -> Tensor:
    for sigma, sigma_next in itertools.pairwise(sigmas):
        latents = latents + (sigma_next - sigma) * field(latents, sigma.expand(latents.shape[0]))
    return latents


def run(field: VelocityField, latents: Tensor = LATENTS, sigmas: Tensor = SIGMAS, **settings) -> Run:
    return sample_toy(field, sigmas, CacheConfig(**settings), latents=latents)
