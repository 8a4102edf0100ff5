"""The picture that shows cached beside uncached."""

from pathlib import Path

import numpy as np
import pytest

from afcache.cli import side_by_side
from afcache.cli.side_by_side import amplification, difference_title


@pytest.mark.parametrize(
    ("largest", "factor"),
    [(1.0, 1), (0.5, 2), (0.2, 5), (0.0101, 50), (0.01, 100), (0.0012, 500), (1e-7, 1000), (0.0, 1000)],
)
def test_a_difference_is_amplified_as_far_as_it_stays_below_white(largest: float, factor: int):
    difference = np.linspace(0, 1, 3000).reshape(10, 100, 3)
    difference = np.minimum(difference / 0.99, 1.0) * largest
    assert amplification(difference) == factor


def test_a_few_bright_pixels_do_not_hide_the_others():
    difference = np.full((32, 32, 3), 0.002)
    difference[0, 0] = 1.0
    assert amplification(difference) == 500


def test_the_title_names_the_factor_and_the_mean():
    assert difference_title(np.full((4, 4, 3), 0.00123), 500) == "their difference x 500 (mean 0.00123)"
    assert difference_title(np.zeros((4, 4, 3)), 1000) == "no difference"


@pytest.mark.parametrize("draw", [side_by_side._draw_pictures, side_by_side._draw_frames])
def test_dollars_in_a_prompt_are_no_formula(tmp_path: Path, draw):
    class Shown:
        panels = ((np.zeros((3, 8, 8, 3)), "signs: $5% and $_ off"),) * 3

    draw([Shown()], tmp_path / "compare.png")
    assert (tmp_path / "compare.png").stat().st_size > 0
