"""Processes that keep the variance: what their numbers say, in closed form."""

import math

import pytest
import torch

from afcache.functional.process import Process, direction, from_numbers, mean_output, moved
from afcache.functional.target import keep_output, release_output

NOW, THEN = 1.1, 0.9
X, NOISE, CLEAN = (torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3))


def noise_process(now: float = NOW, then: float = THEN) -> Process:
    kept = math.cos(then) / math.cos(now)
    numbers = (kept, math.sin(then) - math.sin(now) * kept, 0.0, 1.0, -math.sin(now), math.cos(now))
    return from_numbers([numbers], torch.device("cpu"))[0]


def at(angle: float) -> torch.Tensor:
    """Latents of one clean image and one noise."""
    return math.cos(angle) * CLEAN + math.sin(angle) * NOISE


def test_where_the_noise_stays_the_same_first_order_is_exact():
    process = noise_process()
    torch.testing.assert_close(at(NOW) + moved(at(NOW), NOISE, torch.tensor(0.0), process=process), at(THEN))
    output, factor = mean_output(at(NOW), at(THEN), torch.tensor(0.0), process=process)
    torch.testing.assert_close(output, NOISE, rtol=1e-4, atol=1e-5)
    assert factor is process.added


def test_the_direction_is_that_of_the_path_for_both_predictions():
    velocity = math.cos(NOW) * NOISE - math.sin(NOW) * CLEAN
    of_noise = direction(NOISE, at(NOW), process=noise_process())
    torch.testing.assert_close(of_noise / math.cos(NOW), velocity, rtol=1e-4, atol=1e-5)
    (process,) = from_numbers([(1.0, -0.2, 0.0, 1.0, 0.0, 1.0)], torch.device("cpu"))
    torch.testing.assert_close(direction(velocity, at(NOW), process=process), velocity)


def test_a_flow_is_as_it_was():
    length = torch.tensor(-0.25)
    assert torch.equal(moved(X, NOISE, length, process=None), length * NOISE)
    output, factor = mean_output(X, X + length * NOISE, length, process=None)
    torch.testing.assert_close(output, NOISE, rtol=1e-5, atol=1e-5)
    assert factor is length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_released(dtype: torch.dtype):
    (process,) = from_numbers([(0.9, -0.2, 0.3, 0.8, 0.0, 1.0)], torch.device("cpu"))
    x, output = X.to(dtype), NOISE.to(dtype)
    kept = keep_output(output, x, torch.tensor(0.7), target="noise", process=process)
    assert kept.dtype == torch.float32
    released = release_output(kept, x, torch.tensor(0.7), target="noise", process=process)
    assert released.dtype == dtype
    torch.testing.assert_close(released, output, rtol=1e-5, atol=1e-5)
    assert not torch.equal(kept, keep_output(output, x, torch.tensor(0.7), target="velocity", process=process))


def test_each_step_has_memory_of_its_own():
    steps = from_numbers([(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)] * 2, torch.device("cpu"))
    pointers = {value.data_ptr() for step in steps for value in step}
    assert len(pointers) == 12
    assert all(value.ndim == 0 for step in steps for value in step)
