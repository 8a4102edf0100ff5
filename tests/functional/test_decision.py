"""Who decides, and by which errors."""

import pytest
import torch

from afcache.functional.decision import decide, predict_error
from afcache.functional.initial import uncoupled
from afcache.functional.plans import schedule_steps
from afcache.functional.state import CacheState
from afcache.sampling.primitives import init_state
from afcache.settings.config import CacheConfig


def measured_state(rate: float) -> CacheState:
    """Two refreshes at 1.0 and 0.9, an order-1 error rate, nothing accumulated."""
    state = init_state(1, 3, 4, config=CacheConfig(order=1))
    return state._replace(
        nodes=torch.tensor([[0.9], [1.0]]),
        num_nodes=torch.tensor([2]),
        error_rate=torch.tensor([rate]),
        error_order=torch.tensor([1]),
        last_gap=torch.tensor([0.1]),
    )


def test_decide_weighs_the_leaders_error_and_adds_that_of_the_others():
    config = CacheConfig(warmup_steps=1)
    sigmas = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.0])
    leader, other = measured_state(5.0), measured_state(3.0)
    schedule = schedule_steps(sigmas, config)[2]
    # e = c h^2 = 5 * 0.01 and 3 * 0.01; guidance scale 4: 4 * 0.05 + 3 * 0.03, times a step of 0.1.
    coupling = uncoupled(1)._replace(
        weight=torch.tensor([4.0]), others_error=3.0 * predict_error(other, schedule, config=config)
    )
    _, predicted, accumulated, _ = decide(leader, schedule, coupling, config=config)
    assert float(predicted) == pytest.approx(0.05, rel=1e-4)
    assert float(accumulated) == pytest.approx((4 * 0.05 + 3 * 0.03) * 0.1, rel=1e-4)


@pytest.mark.parametrize("adopted", [True, False])
def test_a_follower_adopts_the_leaders_decision(adopted: bool):
    config = CacheConfig(warmup_steps=1, tolerance=1e9 if adopted else 0.0)
    schedule = schedule_steps(torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.0]), config)[2]
    coupling = uncoupled(1)._replace(is_follower=torch.tensor(True), leader_refresh=torch.tensor([adopted]))
    refresh, *_ = decide(measured_state(1.0), schedule, coupling, config=config)
    assert bool(refresh) == adopted


def test_a_follower_without_history_computes():
    config = CacheConfig(warmup_steps=1, tolerance=1e9)
    schedule = schedule_steps(torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.0]), config)[2]
    coupling = uncoupled(1)._replace(is_follower=torch.tensor(True))
    refresh, *_ = decide(init_state(1, 3, 4, config=config), schedule, coupling, config=config)
    assert bool(refresh)
