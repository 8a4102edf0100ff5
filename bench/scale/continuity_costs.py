"""What it costs a cached step to see whether it begins where the last one led."""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import afcache
from afcache import CacheConfig
from afcache.functional.initial import empty_state, empty_trail, shape_of, uncoupled, unled
from afcache.functional.model import model_of, scaled_dot_product_attention
from afcache.functional.plans import schedule_steps
from afcache.models.flux1.architecture import FLUX
from afcache.runtime.compiled import CompiledStep, CompileOptions, cached_step
from bench.models.random_flux import make_transformer
from bench.record.clock import seconds_of
from bench.record.spread import shown_spread
from bench.scale.part_costs import make_inputs

# Steps that are all forecast, by whatever error: their cost does not depend on it.
_NOISE = CacheConfig(target="noise", policy="fixed", interval=1000, warmup_steps=1)
_TARGETS = {"noise": _NOISE, "residual": dataclasses.replace(_NOISE, target="residual")}
_STEP = 3


def measure_continuity(tokens: int, repeats: int) -> list[dict[str, Any]]:
    """A compiled cached step with and without the look at its latents, in alternation, as the runtime calls it.

    Args:
        tokens: of the image.
        repeats: calls of each.

    """
    transformer = make_transformer(dim=512, double=4, single=8)
    inputs = make_inputs(tokens, transformer.config.joint_attention_dim)
    rows = []
    for target, config in _TARGETS.items():
        calls = {looks: _call(transformer, inputs, config, looks=looks) for looks in (False, True)}
        seconds: dict[bool, list[float]] = {looks: [] for looks in calls}
        for repeat in range(repeats + 3):
            for looks, call in calls.items():
                _, spent = seconds_of(call)
                if repeat >= 3:
                    seconds[looks].append(spent)
        without, with_look = (statistics.median(seconds[looks]) for looks in (False, True))
        rows.append(
            {
                "image tokens": tokens,
                "forecast": target,
                "cached step, ms": shown_spread(seconds[True], scale=1e3),
                "without looking, ms": shown_spread(seconds[False], scale=1e3),
                "looking, ms": f"{1e3 * (with_look - without):.3f}",
                "% of the cached step": f"{100 * (with_look - without) / with_look:.1f}",
            }
        )
    return rows


def _call(transformer: Any, inputs: afcache.FluxInputs, config: CacheConfig, *, looks: bool) -> Callable[[], Any]:
    """A cached step of one image, as from its third step on."""
    model = model_of(transformer, FLUX, scaled_dot_product_attention)
    latents: Tensor = inputs.hidden_states
    coupling = uncoupled(len(latents))._replace(trails=(empty_trail(latents.shape),) if looks else None)
    coupling = unled(coupling, latents) if config.forecasts_output else coupling
    state = empty_state(shape_of(model.sizes, latents.shape, 0, config=config), config=config)
    state = state if looks else state._replace(trail=None)
    schedules = schedule_steps(torch.linspace(1, 0, 29), config)
    step = CompiledStep(cached_step(model, None, config, None), torch.compile, CompileOptions())
    _, (state,), *_ = step(inputs, (state,), schedules[0], coupling)
    if state.trail is not None:
        # The latents of the step that is timed are where the last one led.
        here = state.trail._replace(latents=latents.clone(), sigma=schedules[_STEP].sigma.reshape(1).clone())
        state = state._replace(trail=here)
    arguments = inputs, (state,), schedules[_STEP], coupling
    _, _, record, _ = step(*arguments)
    assert not bool(record.is_computed)
    settled = step.without_guards(*arguments)
    return lambda: settled(*arguments)
