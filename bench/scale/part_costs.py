"""Where a cached step and a refresh spend their time: each part compiled and timed alone."""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch

import afcache
from afcache.functional import forecast
from afcache.functional.decision import forecast_row
from afcache.functional.initial import uncoupled
from afcache.functional.model import Architecture, Embedded, scaled_dot_product_attention
from afcache.functional.plans import schedule_steps
from afcache.models.flux1 import architecture as flux1
from afcache.models.flux1 import inputs as flux1_inputs
from afcache.runtime.compiled import CompiledStep, CompileOptions
from afcache.runtime.steps import write_newest
from afcache.sampling.primitives import cached_forward, init_state
from bench.models.random_flux import TEXT_TOKENS, make_transformer
from bench.record.clock import seconds_of
from bench.record.spread import shown_spread
from bench.scale.step_costs import STEPS, forced

_FORECAST = "forecast (one row over the history)"
_MACHINERY = "machinery with an empty model"


def measure_parts(tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Where a cached step and a refresh spend their time: each part compiled and timed alone, in alternation."""
    transformer = make_transformer(dim=512, double=4, single=8)
    inputs = make_inputs(tokens, transformer.config.joint_attention_dim)
    config = dataclasses.replace(forced(1000), warmup_steps=1)
    schedules = schedule_steps(torch.linspace(1, 0, STEPS + 1), config)
    state, coupling = init_state(1, tokens, 512, config=config), uncoupled(1)
    embedded = flux1.embed(transformer, inputs)
    velocity = flux1.head(transformer, embedded.hidden_states, embedded.temb)
    # The machinery of a step around a model that costs nothing.
    empty = Architecture(
        sizes=flux1.sizes,
        embed=lambda transformer, inputs: Embedded(inputs.hidden_states.clone(), inputs.temb.clone()),
        stack=lambda model, inputs, embedded: embedded.hidden_states + 1,
        head=lambda transformer, hidden_states, temb: hidden_states[..., :64].clone(),
        place=flux1.place,
        latents=flux1.latents_of,
    )

    def step_of(architecture: Architecture, writer: Any) -> CompiledStep:
        def run(inputs: Any, state: Any, schedule: Any) -> Any:
            return cached_forward(
                transformer,
                inputs,
                state,
                schedule,
                coupling,
                architecture=architecture,
                kernel=scaled_dot_product_attention,
                config=config,
                writer=writer,
            )

        return _compile(run)

    def alone(step: CompiledStep, *args: Any) -> Callable[[], Any]:
        """A call as the runtime makes it from an image's third step on."""
        step(*args)
        settled = step.without_guards(*args)
        return lambda: settled(*args)

    compiled, machinery, writing = step_of(flux1.FLUX, None), step_of(empty, None), step_of(empty, write_newest)
    embed = _compile(lambda inputs: flux1.embed(transformer, inputs))
    head = _compile(lambda hidden, temb: flux1.head(transformer, hidden, temb))
    row = _compile(lambda state, schedule: forecast.apply_row(forecast_row(state, schedule, config=config), state.history))
    forward = torch.compile(transformer.forward, fullgraph=True, **CompileOptions().tuning())
    _, state, _ = compiled(inputs, state, schedules[0])
    cached = schedules[3]
    arguments = flux1_inputs.host_arguments(inputs)
    parts: dict[str, Callable[[], Any]] = {
        "uncached step": lambda: forward(**arguments, return_dict=False),
        "refresh": alone(compiled, inputs, state, schedules[0]),
        "cached step": alone(compiled, inputs, state, cached),
        "the same with Dynamo's guards": lambda: compiled(inputs, state, cached),
        "embedding": alone(embed, inputs),
        _FORECAST: alone(row, state, cached),
        "head": alone(head, embedded.hidden_states, embedded.temb),
        _MACHINERY: alone(machinery, embedded, state, cached),
        "the same with the history written in place": alone(writing, embedded, state, cached),
        "a copy of the history alone": state.history.clone,
        "a copy of the velocity alone": velocity.clone,
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(repeats + 3):
        for name, call in parts.items():
            _, spent = seconds_of(call)
            if repeat >= 3:
                seconds[name].append(spent)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    shown = {name: shown_spread(values, scale=1e3) for name, values in seconds.items()}
    outside = medians["embedding"] + medians["head"]
    differences = {
        "blocks (uncached step - embedding - head)": medians["uncached step"] - outside,
        "decision and statistics (machinery - forecast)": medians[_MACHINERY] - medians[_FORECAST],
        "dispatch (cached step - embedding - head - machinery)": medians["cached step"] - outside - medians[_MACHINERY],
    }
    medians |= differences
    shown |= {name: f"{1e3 * value:.3g}" for name, value in differences.items()}
    return [
        {
            "image tokens": tokens,
            "part": name,
            "milliseconds": shown[name],
            "% of a refresh": 100 * value / medians["refresh"],
        }
        for name, value in medians.items()
    ]


def _compile(function: Any) -> CompiledStep:
    return CompiledStep(function, torch.compile, CompileOptions())


def make_inputs(tokens: int, dim: int) -> afcache.FluxInputs:
    """One sample in the middle of an image, a square of so many tokens."""
    side = int(tokens**0.5)
    positions = torch.cartesian_prod(torch.zeros(1), torch.arange(float(side)), torch.arange(float(side)))
    return afcache.FluxInputs(
        hidden_states=torch.randn(1, tokens, 64),
        encoder_hidden_states=torch.randn(1, TEXT_TOKENS, dim),
        pooled_projections=torch.randn(1, dim),
        timestep=torch.full((1,), 0.5),
        img_ids=positions,
        txt_ids=torch.zeros(TEXT_TOKENS, 3),
        guidance=torch.full((1,), 3.5),
    )
