"""Many seeds at once, each with its own decisions, and the block stack only for those that refresh.

The steps are the library's own `take`; only the stack is told which samples count, because `torch.where` would
throw the others away. Images and decisions are the pipeline's (tests/bench/test_search.py), in a fraction of its time. Groups
of blocks are computed for all samples; what is counted is what each of them alone would have run.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from afcache import CacheConfig
from afcache._typing import Latents
from afcache.functional import forecast
from afcache.functional.decision import decide, forecast_row, predict_error
from afcache.functional.groups.group import divide
from afcache.functional.guidance import follow, lead
from afcache.functional.initial import empty_state, shape_of, uncoupled, unled
from afcache.functional.model import Embedded, Model, Part, model_of, scaled_dot_product_attention
from afcache.functional.plans import schedule_steps
from afcache.functional.state import CacheState, Coupling, GroupRecord, StepRecord, StepSchedule
from afcache.functional.step import prepare, take
from afcache.functional.update import Branch
from afcache.models.flux1.architecture import FLUX, PARTS, sizes
from bench.mini_flux.sampling import Prepared


class Loop(NamedTuple):
    """A batch at its end.

    Attributes:
        latents: `[batch, img_seq, channels]`.
        refreshes: which sample refreshed at which step; bool `[steps, batch]`.
        runs: block evaluations of each block in whole, summed over steps, branches and samples; `[blocks]`.
        mlp_runs: evaluations of its MLPs alone; `[blocks]`.

    """

    latents: Latents
    refreshes: Bool[Tensor, "steps batch"]
    runs: Int[Tensor, " blocks"]
    mlp_runs: Int[Tensor, " blocks"]


@torch.no_grad()
def sample(
    transformer: Any,
    problem: Prepared,
    config: CacheConfig,
    *,
    each: Sequence[CacheConfig] | None = None,
    use_surprise: bool = False,
) -> Loop:
    """Sample a batch with a cache, on the device that it is on.

    Args:
        transformer: the model.
        problem: inputs and schedule.
        config: settings; `batch_decisions` must be "independent".
        each: settings of each sample, where they differ in what may differ (`afcache.settings.changes.OPEN`).
        use_surprise: refresh on the larger of two estimates: the library's, and the error of forecasting block 0's
            modulated input by the same row, times its ratio to e at the last refresh. One guidance branch only.

    """
    inputs = problem.branches[0]
    latents = inputs.hidden_states
    batch, device = latents.shape[0], latents.device
    states = [
        empty_state(
            shape_of(sizes(transformer), latents.shape, branch.encoder_hidden_states.shape[1], config=config),
            config=config,
            device=device,
        )
        for branch in problem.branches
    ]
    scale = torch.full((batch,), float(problem.cfg), device=device)
    signal = _Surprise(states[0]) if use_surprise else None
    refreshes, runs = [], torch.zeros(2, sizes(transformer).num_blocks, dtype=torch.int64, device=device)
    for schedule in schedule_steps(problem.sigmas.to(device), config, each=each):
        placed = [FLUX.place(branch, latents, schedule.sigma) for branch in problem.branches]
        coupling = uncoupled(batch, groups=config.num_groups, device=device)
        if len(states) == 2:
            coupling = lead(tuple(states), schedule, scale, config=config)
        if config.forecasts_output:
            known = scale if len(states) == 2 else torch.full_like(scale, float("nan"))
            coupling = unled(coupling, latents)._replace(guidance_scale=known)
        if signal is not None:
            coupling = coupling._replace(others_error=signal.excess(transformer, placed[0], states[0], schedule, config))
        refresh = _decide(transformer, placed[0], states[0], schedule, coupling, config)
        architecture = _sparse(refresh, sizes(transformer).num_blocks, config)
        model = model_of(transformer, architecture, scaled_dot_product_attention)
        velocities = []
        for index, branch in enumerate(placed):
            (taken,) = take(model, (Branch(branch, states[index]),), schedule, coupling, config=config)
            states[index], record = taken.state, taken.record
            coupling = follow(coupling, record, taken.lead) if index == 0 else coupling
            velocities.append(taken.velocity)
            runs += _count(record, sizes(transformer).num_blocks, config)
            if signal is not None:
                signal.remember(record)
            if index == 0:
                refreshes.append(record.refresh)
        velocity = velocities[0]
        if len(velocities) == 2:
            velocity = velocities[1] + problem.cfg * (velocities[0] - velocities[1])
        latents = latents + (schedule.sigma_next - schedule.sigma) * velocity
    return Loop(latents, torch.stack(refreshes).cpu(), *runs.cpu())


def _decide(
    transformer: Any, inputs: Any, state: CacheState, schedule: StepSchedule, coupling: Coupling, config: CacheConfig
) -> Tensor:
    if not config.rule.is_gated:
        return decide(state, schedule, coupling, config=config)[0]
    model = model_of(transformer, FLUX, scaled_dot_product_attention)
    prepared = prepare(model, Branch(inputs, state), schedule, config=config)
    return decide(state, schedule, coupling, prepared.observation, config=config)[0]


def _sparse(refresh: Tensor, blocks: int, config: CacheConfig) -> Any:
    """FLUX with a stack that runs for the samples that refresh; groups, and blocks that always run, run for all."""
    if config.layerwise is not None:
        return FLUX
    part = Part(config.first_blocks, blocks - config.last_blocks)
    return FLUX._replace(
        stack=functools.partial(_sparse_stack, refresh),
        parts=PARTS._replace(run=functools.partial(_sparse_run, refresh, part)),
    )


def _sparse_stack(refresh: Tensor, model: Model, inputs: Any, embedded: Embedded) -> Tensor:
    rows = refresh.nonzero().flatten()
    some = inputs._replace(encoder_hidden_states=inputs.encoder_hidden_states[rows])
    chosen = Embedded(embedded.hidden_states[rows], embedded.temb[rows])
    return embedded.hidden_states.index_copy(0, rows, FLUX.stack(model, some, chosen))


def _sparse_run(
    refresh: Tensor,
    cached: Part,
    model: Model,
    inputs: Any,
    tokens: Tensor,
    temb: Tensor,
    part: Part,
    attention: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    if part != cached:
        return PARTS.run(model, inputs, tokens, temb, part, attention)
    rows = refresh.nonzero().flatten()
    after, outputs = PARTS.run(model, inputs, tokens[rows], temb[rows], part, attention)
    return tokens.index_copy(0, rows, after), outputs


def _count(record: StepRecord, blocks: int, config: CacheConfig) -> Tensor:
    """Evaluations of each block, and of its MLPs alone, summed over samples; `[2, blocks]`."""
    runs = torch.zeros(2, blocks, dtype=torch.int64, device=record.refresh.device)
    if isinstance(record.groups, GroupRecord):
        for part, choice in zip(divide(blocks, config.num_groups), record.groups.choice, strict=True):
            runs[0, part.start : part.stop] = (choice == 0).sum()
            runs[1, part.start : part.stop] = (choice == 3).sum()
        return runs
    runs[0] = record.refresh.sum()
    runs[0, : config.first_blocks] = record.refresh.numel()
    if config.last_blocks:
        # They run on the forecast and, at a refresh, again.
        runs[0, -config.last_blocks :] += record.refresh.numel()
    return runs


class _Surprise:
    """The second signal: how well the row forecasts block 0's modulated input, which every step knows."""

    def __init__(self, state: CacheState) -> None:
        self.history = torch.zeros_like(state.history)
        self.ratio = torch.zeros_like(state.lag)
        self.modulated = self.error = torch.zeros(0)

    def excess(self, transformer: Any, inputs: Any, state: CacheState, schedule: StepSchedule, config: CacheConfig) -> Tensor:
        """How much more error the signal expects of this step than the library does; at least 0."""
        embedded = FLUX.embed(transformer, inputs)
        self.modulated = PARTS.observe(transformer, embedded.hidden_states, embedded.temb)
        expected = forecast.apply_row(forecast_row(state, schedule, config=config), self.history)
        self.error = (expected - self.modulated).norm(dim=(1, 2)) / self.modulated.norm(dim=(1, 2))
        excess = self.ratio * self.error - predict_error(state, schedule, config=config)
        return torch.where(excess > 0, excess, torch.zeros_like(excess))

    def remember(self, record: StepRecord) -> None:
        """Keep the ratio of the two errors where one was measured."""
        self.history = forecast.push(self.history, self.modulated, record.refresh)
        ratio = record.measured_error / self.error
        self.ratio = torch.where(torch.isfinite(ratio), ratio, self.ratio)
