"""Many seeds at once, each with its own decisions, and the block stack only for those that refresh.

The steps are the library's own `cached_forward`; only the stack is told which samples count, because `torch.where` would
throw the others away. Images and decisions are the pipeline's (tests/test_bench.py), in a fraction of its time.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afcache import CacheConfig
from afcache.functional import forecast
from afcache.functional.attention import AttentionKernel, scaled_dot_product_attention
from afcache.functional.decision import decide, forecast_row, predict_error
from afcache.functional.stack import Embedded
from afcache.functional.step import cached_forward
from afcache.initial import init_state, solo
from afcache.models.flux import FLUX
from afcache.plans import schedule_steps
from afcache.state import CacheState, StepRecord, StepSchedule
from bench.mini_sampling import Prepared


class Loop(NamedTuple):
    """A batch at its end: latents, and which sample refreshed at which step, bool `[steps, batch]`."""

    latents: Tensor
    refreshes: Tensor


@torch.no_grad()
def sample(transformer: Any, problem: Prepared, config: CacheConfig, *, use_surprise: bool = False) -> Loop:
    """Sample a batch with a cache.

    Args:
        transformer: the model.
        problem: inputs and schedule.
        config: settings; `batch_decisions` must be "independent".
        use_surprise: refresh on the larger of two estimates: the library's, and the error of forecasting block 0's
            modulated input by the same row, times its ratio to e at the last refresh. One guidance branch only.

    """
    inputs = problem.branches[0]
    latents = inputs.hidden_states
    batch, img_seq, _ = latents.shape
    states = [init_state(batch, img_seq, transformer.inner_dim, config=config) for _ in problem.branches]
    signal = _Surprise(states[0]) if use_surprise else None
    refreshes = []
    for schedule in schedule_steps(problem.sigmas, config):
        placed = [FLUX.place(branch, latents, schedule.sigma) for branch in problem.branches]
        coupling = solo(batch)
        if len(states) == 2:
            others = abs(1 - problem.cfg) * predict_error(states[1], schedule, config=config)
            coupling = coupling._replace(weight=torch.full((batch,), abs(problem.cfg)), others_error=others)
        if signal is not None:
            coupling = coupling._replace(others_error=signal.excess(transformer, placed[0], states[0], schedule, config))
        refresh = decide(states[0], schedule, coupling, config=config)[0]
        velocities = []
        for index, branch in enumerate(placed):
            if index == 1:
                coupling = solo(batch)._replace(is_follower=torch.ones((), dtype=torch.bool), leader_refresh=refresh)
            velocity, states[index], record = cached_forward(
                transformer,
                branch,
                states[index],
                schedule,
                coupling,
                architecture=FLUX._replace(stack=functools.partial(_sparse_stack, refresh)),
                kernel=scaled_dot_product_attention,
                config=config,
            )
            velocities.append(velocity)
            if signal is not None:
                signal.remember(record)
        velocity = velocities[0]
        if len(velocities) == 2:
            velocity = velocities[1] + problem.cfg * (velocities[0] - velocities[1])
        latents = latents + (schedule.sigma_next - schedule.sigma) * velocity
        refreshes.append(refresh)
    return Loop(latents, torch.stack(refreshes))


def _sparse_stack(refresh: Tensor, transformer: Any, inputs: Any, embedded: Embedded, kernel: AttentionKernel) -> Tensor:
    rows = refresh.nonzero().flatten()
    some = inputs._replace(encoder_hidden_states=inputs.encoder_hidden_states[rows])
    chosen = Embedded(embedded.hidden_states[rows], embedded.temb[rows])
    return embedded.hidden_states.index_copy(0, rows, FLUX.stack(transformer, some, chosen, kernel))


class _Surprise:
    """The second signal: how well the row forecasts block 0's modulated input, which every step knows."""

    def __init__(self, state: CacheState) -> None:
        self.history = torch.zeros_like(state.history)
        self.ratio = torch.zeros(state.num_nodes.shape[0])
        self.modulated = self.error = torch.zeros(0)

    def excess(self, transformer: Any, inputs: Any, state: CacheState, schedule: StepSchedule, config: CacheConfig) -> Tensor:
        """How much more error the signal expects of this step than the library does; at least 0."""
        embedded = FLUX.embed(transformer, inputs)
        block = transformer.transformer_blocks[0]
        self.modulated = block.norm1(embedded.hidden_states, emb=embedded.temb)[0]
        expected = forecast.apply_row(forecast_row(state, schedule, config=config), self.history)
        self.error = (expected - self.modulated).norm(dim=(1, 2)) / self.modulated.norm(dim=(1, 2))
        excess = self.ratio * self.error - predict_error(state, schedule, config=config)
        return torch.where(excess > 0, excess, torch.zeros_like(excess))

    def remember(self, record: StepRecord) -> None:
        """Keep the ratio of the two errors where one was measured."""
        self.history = forecast.push(self.history, self.modulated, record.refresh)
        ratio = record.measured_error / self.error
        self.ratio = torch.where(torch.isfinite(ratio), ratio, self.ratio)
