"""A branch whose blocks' residual is forecast: embeddings, first and last blocks and the head run at every step."""

from afcache._typing import typed
from afcache.functional import forecast
from afcache.functional.decision import forecast_row, growth
from afcache.functional.gates import gate, sections
from afcache.functional.model import Model
from afcache.functional.state import StepSchedule
from afcache.functional.target import keep_residual, release_residual
from afcache.functional.update import Branch, Computed, Opened, Prepared
from afcache.settings.config import CacheConfig


@typed
def prepare_features(model: Model, before: Branch, schedule: StepSchedule, *, config: CacheConfig) -> Prepared:
    """What every step does before it decides: embed, run the first blocks, forecast, and apply last blocks and head.

    Args:
        model: the transformer.
        before: the branch.
        schedule: where the step stands.
        config: settings; static.

    """
    inputs, state = before
    embedded = model.architecture.embed(model.transformer, inputs)
    start = sections.run_first_blocks(model, inputs, embedded, config=config)
    residual_hat = forecast.apply_row(forecast_row(state, schedule, config=config), state.history)
    tokens = release_residual(residual_hat, start)
    hidden_states = sections.run_last_blocks(model, inputs, embedded, tokens, config=config)
    orders = forecast.row_order(state.num_nodes, order=config.order)
    return Prepared(
        inputs=inputs,
        state=state,
        opened=Opened(embedded, start),
        velocity=model.architecture.head(model.transformer, hidden_states, embedded.temb),
        orders=orders,
        growth=growth(state.nodes, orders, schedule.sigma, config=config),
        observation=gate.observe(model, state.gate, embedded, start, config=config),
    )


@typed
def compute_features(model: Model, prepared: Prepared, *, config: CacheConfig) -> Computed:
    """Run the blocks, and the head on what they make."""
    assert prepared.opened is not None
    inputs, (embedded, start) = prepared.inputs, prepared.opened
    tokens = sections.run_cached_blocks(model, inputs, embedded, start, config=config)
    hidden_states = sections.run_last_blocks(model, inputs, embedded, tokens, config=config)
    velocity = model.architecture.head(model.transformer, hidden_states, embedded.temb)
    return Computed(velocity, keep_residual(tokens, start))
