"""Small measurements of solvers: what is counted is what they say."""

import pytest
import torch

from bench import solver_weights, stochastic_steps
from bench.mini_flux import sampling
from bench.stochastic_steps import Flow, Way, sample


def test_under_eulers_step_outputs_weigh_what_their_steps_are_long():
    assert solver_weights.weights(solver_weights.SCHEDULERS["FlowMatchEuler"](), 10) == pytest.approx([1.0] * 10, abs=1e-5)
    assert max(solver_weights.weights(solver_weights.SCHEDULERS["UniPC"](), 10)) > 1.2


@pytest.mark.host
@pytest.mark.parametrize("name", stochastic_steps.SCHEDULERS)
def test_the_same_noise_is_drawn_whatever_is_forecast(name: str):
    pipe, seeds = sampling.load(), (0, 1)
    first = sampling.prepare(pipe, seeds, steps=1).branches[0]
    flow = Flow(pipe, sampling.conditions_of(first), first.hidden_states)

    def drawn(way: Way | None) -> torch.Tensor:
        return sample(flow, stochastic_steps.SCHEDULERS[name](pipe.scheduler.config), seeds, 6, way)

    expected = drawn(None)
    assert torch.equal(drawn(Way("clean image", 1, 1)), expected)
    assert torch.equal(drawn(Way(None, 0, 1)), expected)
    assert not torch.allclose(drawn(Way("velocity", 0, 3)), expected, atol=0.1)
    assert Way("velocity", 0, 3).computed(6) == 3
