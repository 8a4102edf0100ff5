"""The step with a history written in place, and with refreshes at fixed intervals."""

import math

import pytest
import torch
from torch import Tensor

from afcache.functional import forecast
from afcache.settings.config import CacheConfig
from afcache.settings.presets import tuned
from tests.support.toy import LATENTS, SIGMAS, euler, mixture_flow, polynomial_in_sigma, run, sample_toy


def test_a_writer_changes_the_history_in_place_and_nothing_else():
    """The runtime's variant of the step gives the pure one's values, and its state stays where it was."""

    def write(history: Tensor, newest: Tensor, refresh: Tensor) -> None:
        history.copy_(forecast.push(history, newest, refresh))

    config = CacheConfig(tolerance=0.01, warmup_steps=2)
    pure = sample_toy(mixture_flow, SIGMAS, config, latents=LATENTS)
    in_place = sample_toy(mixture_flow, SIGMAS, config, latents=LATENTS, writer=write)
    assert in_place.pattern() == pure.pattern()
    assert torch.equal(in_place.latents, pure.latents)
    assert torch.equal(in_place.state.history, pure.state.history)
    assert len({state.history.data_ptr() for state in in_place.states}) == 1
    assert len({state.history.data_ptr() for state in pure.states}) > 2


@pytest.mark.parametrize("interval", [1, 3, 5])
@pytest.mark.parametrize("warmup", [1, 2, 3])
def test_the_fixed_policy_refreshes_every_so_many_steps_after_the_warmup(interval: int, warmup: int):
    result = run(mixture_flow, policy="fixed", interval=interval, warmup_steps=warmup, tolerance=0.0)
    expected = ["F" if i < warmup or (i - warmup + 1) % interval == 0 else "." for i in range(28)]
    assert result.pattern() == "".join(expected)


def test_the_fixed_policy_with_taylorseers_row_is_taylorseer():
    """Re-computed by hand: order 1 in step index, a full step every third, no correction."""
    field = polynomial_in_sigma(0.3, 1.1, -0.7, 0.5)
    settings = {"policy": "fixed", "forecast": "taylorseer", "interval": 3, "warmup_steps": 3, "correction": False}
    result = run(field, **settings)
    latents, known = LATENTS, []
    for step in range(28):
        sigma, sigma_next = SIGMAS[step], SIGMAS[step + 1]
        if step < 3 or (step - 2) % 3 == 0:
            velocity = field(latents, sigma.expand(2))
            known.append((step, velocity))
        else:
            (before, older), (last, newest) = known[-2:]
            velocity = newest + (newest - older) / (last - before) * (step - last)
        latents = latents + (sigma_next - sigma) * velocity
    assert result.pattern() == "FFF" + "..F" * 8 + "."
    torch.testing.assert_close(result.latents, latents, rtol=0, atol=2e-5)
    assert float((result.latents - euler(field, LATENTS)).abs().max()) > 1e-3


def test_last_step_is_computed_on_request():
    settings = {"tolerance": 1e9, "max_growth": math.inf, "warmup_steps": 2}
    field = polynomial_in_sigma(1.0, 0.1)
    assert run(field, **settings).pattern() == "FF" + "." * 26
    assert run(field, **settings, refresh_last_step=True).pattern() == "FF" + "." * 25 + "F"


def test_settings_of_each_sample_are_those_that_it_would_have_alone():
    """0-d for all and `[batch]` for each are the same numbers; a sample follows its own, whatever its neighbour's are."""
    latents = torch.cat([LATENTS[:1], LATENTS[:1]])
    careful, bold = tuned(0.004), tuned(0.064)
    alone = [sample_toy(mixture_flow, SIGMAS, config, latents=latents) for config in (careful, bold)]
    assert alone[0].pattern() != alone[1].pattern()
    for config, expected in zip((careful, bold), alone, strict=True):
        same = sample_toy(mixture_flow, SIGMAS, careful, latents=latents, each=(config, config))
        assert torch.equal(same.latents, expected.latents)
    mixed = sample_toy(mixture_flow, SIGMAS, careful, latents=latents, each=(careful, bold))
    assert [mixed.pattern(0), mixed.pattern(1)] == [alone[0].pattern(0), alone[1].pattern(1)]
    for sample, expected in enumerate(alone):
        assert torch.equal(mixed.latents[sample], expected.latents[sample])
