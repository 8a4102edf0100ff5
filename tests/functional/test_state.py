import math

import pytest
import torch

from afcache.functional.initial import state_bytes, uncoupled
from afcache.functional.plans import schedule_steps
from afcache.sampling.primitives import check_state, init_state
from afcache.settings.config import CacheConfig

SHAPE = {"batch": 2, "img_seq": 5, "dim": 3, "config": CacheConfig()}


def make_state(**options):
    return init_state(2, 5, 3, config=CacheConfig(), **options)


def test_init_state_is_empty_and_unmeasured():
    state = make_state()
    assert state.num_nodes.tolist() == [0, 0]
    assert torch.isinf(state.error_rate).all()
    check_state(state, **SHAPE)


def test_init_state_keeps_statistics_in_float32():
    state = make_state(dtype=torch.bfloat16)
    assert state.history.dtype == torch.bfloat16
    assert state.nodes.dtype == state.lag.dtype == torch.float32
    check_state(state, **SHAPE)


def test_check_state_names_the_field_with_the_wrong_shape():
    with pytest.raises(ValueError, match=r"CacheState\.history has shape \(2, 2, 5, 3\), expected \(2, 2, 9, 3\)"):
        check_state(make_state(), **{**SHAPE, "img_seq": 9})


def test_check_state_names_the_field_with_the_wrong_dtype():
    with pytest.raises(ValueError, match=r"CacheState\.nodes must be torch\.float32, got torch\.float64"):
        check_state(make_state()._replace(nodes=torch.zeros(2, 2, dtype=torch.float64)), **SHAPE)


def test_what_is_kept_of_outputs_is_float32_alone():
    config = CacheConfig(target="noise")
    state = init_state(2, 5, 3, config=config, dtype=torch.bfloat16)
    check_state(state, **{**SHAPE, "config": config})
    with pytest.raises(ValueError, match=r"CacheState\.history must be torch\.float32, got torch\.float16"):
        check_state(state._replace(history=state.history.half()), **{**SHAPE, "config": config})


def test_check_state_refuses_python_numbers():
    with pytest.raises(TypeError, match=r"CacheState\.lag must be a tensor, got float"):
        check_state(make_state()._replace(lag=0.0), **SHAPE)  # pyright: ignore[reportArgumentType]


IMPOSSIBLE = {
    "num_nodes": (-3, "between 0 and 2, and is not for sample 1: -3"),
    "error_rate": (math.nan, ">= 0, or infinite, and is not for sample 1: nan"),
    "accumulated_error": (-0.5, ">= 0, and is not for sample 1: -0.5"),
    "last_gap": (math.inf, "finite and >= 0, and is not for sample 1: inf"),
    "lag": (math.nan, "finite, and is not for sample 1: nan"),
}


@pytest.mark.parametrize("field", IMPOSSIBLE)
def test_check_state_refuses_a_value_that_cannot_be(field: str):
    value, message = IMPOSSIBLE[field]
    state = make_state()
    getattr(state, field)[1] = value
    with pytest.raises(ValueError, match=rf"CacheState\.{field} must be {message}. Start from init_state"):
        check_state(state, **SHAPE)


def test_check_state_looks_at_what_was_filled_of_a_history():
    state = make_state()
    state.history[1, 0, 2, 1] = math.nan
    check_state(state._replace(num_nodes=torch.tensor([1, 2])), **SHAPE)
    with pytest.raises(ValueError, match=r"CacheState\.history must be finite where it was filled, and is not for sample 0"):
        check_state(state._replace(num_nodes=torch.tensor([2, 2])), **SHAPE)


def test_a_policy_without_error_control_may_carry_any_error():
    config = CacheConfig(policy="fixed", max_nodes=2)
    state = make_state()
    state.error_rate[0] = math.nan
    check_state(state, **{**SHAPE, "config": config})
    with pytest.raises(ValueError, match="error_rate"):
        check_state(state, **SHAPE)


def test_state_bytes_counts_every_field():
    # history 2*2*5*3*4, nodes and steps 2*2*4, two int64 and four float32 vectors of 2.
    assert state_bytes(make_state()) == 240 + 2 * 16 + 2 * 16 + 4 * 8


def test_a_scheduled_step_is_made_of_scalars_in_float32():
    schedule = schedule_steps(torch.linspace(1, 0, 6, dtype=torch.float64), CacheConfig(warmup_steps=1))[-1]
    assert schedule.response is None
    assert schedule.process is None
    assert all(value.ndim == 0 for value in schedule if isinstance(value, torch.Tensor))
    assert schedule.sigma.dtype == torch.float32
    assert (int(schedule.step_index), bool(schedule.is_forced)) == (4, False)
    assert float(schedule.sigma_next) == 0.0


def test_each_step_has_its_own_row_of_a_solvers_response():
    rows = torch.arange(15, dtype=torch.float64).reshape(5, 3)
    schedule = schedule_steps(torch.linspace(1, 0, 6), CacheConfig(), responses=rows)
    given = [step.response for step in schedule if step.response is not None]
    assert torch.equal(torch.stack(given), rows.to(torch.float32))


def test_solo_weighs_one_and_follows_nobody():
    coupling = uncoupled(3)
    assert coupling.weight.tolist() == [1.0] * 3
    assert not bool(coupling.is_follower)
