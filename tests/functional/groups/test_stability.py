import math

import pytest
import torch

from afcache.functional.groups.stability import REFERENCE_GAP, adapt_gain, classify, corrected_similarity, track

BOUNDS = (0.98, 0.95, 0.9)


def at_angle(angle: float) -> torch.Tensor:
    """A residual `[1, 1, 1, 2]` on the unit circle."""
    return torch.tensor([math.cos(angle), math.sin(angle)]).reshape(1, 1, 1, 2)


def value(x: float) -> torch.Tensor:
    return torch.tensor([[x]])


def flag(x: bool) -> torch.Tensor:
    return torch.tensor([[x]])


@pytest.mark.parametrize("gap", [0.01, 0.05, 0.2])
def test_similarity_of_a_residual_that_turns_evenly_does_not_depend_on_the_gap(gap: float):
    speed = 6.0
    similarity = corrected_similarity(at_angle(speed * gap), at_angle(0.0), value(gap))
    assert float(similarity) == pytest.approx(math.cos(speed * REFERENCE_GAP), abs=1e-3)


def test_similarity_is_blind_to_length_and_keeps_groups_and_samples_apart():
    newest = torch.stack([at_angle(0.0)[0], at_angle(0.4)[0]])
    similarity = corrected_similarity(5 * newest, torch.stack([at_angle(0.0)[0]] * 2), torch.full((2, 1), REFERENCE_GAP))
    torch.testing.assert_close(similarity, torch.tensor([[1.0], [math.cos(0.4)]]), atol=1e-3, rtol=0)


def test_opposite_residuals_over_a_short_gap_stay_in_range():
    assert float(corrected_similarity(at_angle(3.0), at_angle(0.0), value(0.01))) == pytest.approx(-1.0)


def test_track_averages_after_the_first_measurement():
    kwargs = {"is_measured": flag(True), "decay": 0.75}
    first = track(value(0.0), value(0.9), is_first=flag(True), **kwargs)
    assert float(first) == pytest.approx(0.9)
    assert float(track(first, value(0.5), is_first=flag(False), **kwargs)) == pytest.approx(0.75 * 0.9 + 0.25 * 0.5)
    kept = track(first, value(0.5), is_measured=flag(False), is_first=flag(False), decay=0.75)
    assert torch.equal(kept, first)


def test_a_similarity_that_is_not_finite_counts_as_unstable():
    kwargs = {"is_measured": flag(True), "is_first": flag(True), "decay": 0.5}
    assert float(track(value(0.9), value(math.nan), **kwargs)) == 0.0


@pytest.mark.parametrize(("stability", "expected"), [(0.99, 0), (0.96, 1), (0.92, 2), (0.5, 3)])
def test_the_first_class_is_that_of_the_bounds(stability: float, expected: int):
    found = classify(value(stability), torch.tensor([[3]]), is_first=flag(True), bounds=BOUNDS, margin=0.005)
    assert int(found) == expected


@pytest.mark.parametrize("previous", [0, 1])
def test_a_class_changes_only_beyond_the_margin(previous: int):
    def of(stability: float) -> int:
        return int(classify(value(stability), torch.tensor([[previous]]), is_first=flag(False), bounds=BOUNDS, margin=0.005))

    assert of(0.982) == of(0.978) == previous
    assert of(0.986) == 0
    assert of(0.974) == 1
    assert of(0.5) == 3


def step_gain(gain: torch.Tensor, incurred: float, tolerance: float = 0.016) -> torch.Tensor:
    measured = torch.ones(1, dtype=torch.bool)
    return adapt_gain(gain, torch.tensor([incurred]), tolerance=torch.tensor(tolerance), is_measured=measured)


@pytest.mark.parametrize("start", [0.25, 4.0])
def test_the_gain_converges_from_both_sides(start: float):
    """A synthetic trajectory: what is incurred grows with the square of the thresholds, and meets the tolerance at gain 1.3."""
    gain, path = torch.tensor([start]), []
    for _ in range(200):
        gain = step_gain(gain, 0.016 * float(gain / 1.3) ** 2)
        path.append(float(gain))
    # It falls by 0.7 once it is over 1.3, and climbs back in steps of 5 %.
    assert all(0.7 * 1.3 <= value <= 1.05 * 1.3 for value in path[60:])
    assert max(path[60:]) > 1.2


def test_the_gain_rises_slowly_falls_quickly_and_is_bounded():
    one = torch.ones(1)
    assert float(step_gain(one, 0.001)) == pytest.approx(1.05)
    assert float(step_gain(one, 0.017)) == pytest.approx(0.7)
    assert float(step_gain(one, math.nan)) == pytest.approx(0.7)
    low, high = one, one
    for _ in range(100):
        low, high = step_gain(low, 1.0), step_gain(high, 0.0)
    assert (float(low), float(high)) == (0.25, 4.0)


def test_the_gain_waits_for_a_measurement():
    unmeasured = torch.zeros(1, dtype=torch.bool)
    kept = adapt_gain(torch.ones(1), torch.tensor([math.nan]), tolerance=torch.tensor(0.016), is_measured=unmeasured)
    assert float(kept) == 1.0
