"""What is drawn beside the sample on a schedule of its own, as if it were on the sample's."""

import pytest
import torch
from torch import Tensor

from afcache.models.hosted.pace import enter, leave, pace_of

STEPS = 12


def shifted(shift: float) -> Tensor:
    level = torch.linspace(1.0, 0.0, STEPS + 1)
    return shift * level / (1 + (shift - 1) * level)


def falling(seed: int) -> Tensor:
    """Any schedule from 1 to 0."""
    parts = torch.rand(STEPS, generator=torch.Generator().manual_seed(seed)) + 0.1
    return torch.cat([torch.ones(1), 1 - parts.cumsum(0) / parts.sum()]).clamp(min=0.0)


def numbers(seed: int) -> Tensor:
    return torch.randn(5, generator=torch.Generator().manual_seed(seed))


def scales(s: Tensor, u: Tensor) -> list[Tensor]:
    """P at every level; it is 1 at the end, where both schedules are at the picture."""
    return [pace_of(s, u, step).scale for step in range(STEPS)] + [torch.ones(())]


@pytest.mark.parametrize(("shift", "beside"), [(12.0, 3.0), (3.0, 12.0), (12.0, 6.0)])
def test_what_is_straight_stays_straight(shift: float, beside: float):
    s, u = shifted(shift), shifted(beside)
    noise, picture = numbers(0), numbers(1)
    for step in range(STEPS):
        pace = pace_of(s, u, step)
        x = (1 - u[step]) * picture + u[step] * noise
        k = beside / shift
        torch.testing.assert_close(pace.scale * x, (1 - s[step]) * picture + s[step] * k * noise)
        torch.testing.assert_close(enter(pace, noise - picture, x), k * noise - picture, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("s", "u"), [(shifted(12.0), shifted(3.0)), (falling(0), falling(1)), (shifted(12.0), falling(2))])
def test_a_step_of_one_is_a_step_of_the_other(s: Tensor, u: Tensor):
    for step, (scale, scale_next) in enumerate(zip(scales(s, u)[:-1], scales(s, u)[1:], strict=True)):
        x, v = numbers(step), numbers(100 + step)
        moved = scale * x + (s[step + 1] - s[step]) * enter(pace_of(s, u, step), v, x)
        torch.testing.assert_close(moved, scale_next * (x + (u[step + 1] - u[step]) * v), rtol=1e-4, atol=1e-5)


def test_a_velocity_comes_back_as_it_was():
    x, v = numbers(0), numbers(1)
    for step in range(STEPS):
        pace = pace_of(shifted(12.0), shifted(3.0), step)
        torch.testing.assert_close(leave(pace, enter(pace, v, x), x), v)


@pytest.mark.parametrize("sigmas", [shifted(3.0), torch.tensor([1.0, 0.0])])
def test_one_schedule_for_both_changes_nothing(sigmas: Tensor):
    for step in range(len(sigmas) - 1):
        assert [float(value) for value in pace_of(sigmas, sigmas, step)] == [1.0, 1.0, 0.0]
