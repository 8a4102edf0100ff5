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
    if model.architecture.forward is not None:
        return model.architecture.forward(model, inputs)
    embedded = model.architecture.embed(model.transformer, inputs)
    return model.architecture.head(model.transformer, model.architecture.stack(model, inputs, embedded), embedded.temb)


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
        velocity=release_output(kept_hat, latents, schedule.sigma, target=config.target),
        orders=orders,
        growth=growth(state.nodes, orders, schedule.sigma, config=config),
    )


@typed
def compute_output(model: Model, prepared: Prepared, schedule: StepSchedule, *, config: CacheConfig) -> Computed:
    """Run the whole model."""
    velocity = full_forward(model, prepared.inputs)
    latents = model.architecture.latents(prepared.inputs)
    return Computed(velocity, keep_output(velocity, latents, schedule.sigma, target=config.target))
