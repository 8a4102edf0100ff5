"""A branch whose velocity is forecast: of the model nothing runs at a cached step, and nothing of its inside is known."""

from typing import Any

from torch import Tensor

from afcache._typing import typed
from afcache.functional import forecast
from afcache.functional.decision import forecast_row, growth
from afcache.functional.model import Model
from afcache.functional.state import StepSchedule
from afcache.functional.target import keep_output, release_output
from afcache.functional.update import Branch, Computed, Prepared
from afcache.settings.config import CacheConfig


@typed
def full_forward(model: Model, inputs: Any) -> Tensor:
    """Compute the velocity without any cache: embed, all blocks, head; of the latents' shape."""
    (velocity,) = full_forwards(model, (inputs,))
    return velocity


@typed
def full_forwards(model: Model, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Compute the velocities of every branch of a call without any cache."""
    architecture = model.architecture
    if architecture.forward is not None:
        return architecture.forward(model, inputs)

    def forward(its: Any) -> Tensor:
        embedded = architecture.embed(model.transformer, its)
        return architecture.head(model.transformer, architecture.stack(model, its, embedded), embedded.temb)

    return tuple(map(forward, inputs))


@typed
def prepare_output(model: Model, before: Branch, schedule: StepSchedule, *, config: CacheConfig) -> Prepared:
    """What every step does before it decides: forecast what the model would return at these latents.

    Args:
        model: the transformer.
        before: the branch.
        schedule: where the step stands.
        config: settings; static.
    Cost:
        one pass over the history and the latents, in float32.

    """
    inputs, state = before
    latents = model.architecture.latents(inputs)
    kept_hat = forecast.apply_row(forecast_row(state, schedule, config=config), state.history)
    orders = forecast.row_order(state.num_nodes, order=config.order)
    return Prepared(
        inputs=inputs,
        state=state,
        velocity=release_output(kept_hat, latents, schedule.sigma, target=config.target, process=schedule.process),
        orders=orders,
        growth=growth(state.nodes, orders, schedule.sigma, config=config),
    )


@typed
def compute_outputs(
    model: Model, prepared: tuple[Prepared, ...], schedule: StepSchedule, *, config: CacheConfig
) -> tuple[Computed, ...]:
    """Run the whole model for every branch of a call."""
    inputs = tuple(each.inputs for each in prepared)
    computed = []
    for its, velocity in zip(inputs, full_forwards(model, inputs), strict=True):
        latents = model.architecture.latents(its)
        kept = keep_output(velocity, latents, schedule.sigma, target=config.target, process=schedule.process)
        computed.append(Computed(velocity, kept))
    return tuple(computed)
