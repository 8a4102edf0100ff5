"""The rows of `bench.compare_targets`."""

import pytest

from bench.compare_targets import SETTINGS, VARIANTS, _row
from bench.search.curves import Point


def test_a_row_compares_speeds_at_equal_quality():
    base = [Point(2.0, (50.0, 50.0)), Point(4.0, (30.0, 30.0))]
    bolder = [Point(3.0, (50.0, 50.0)), Point(6.0, (34.0, 26.0))]
    row = _row(SETTINGS[0], "bolder", bolder, base)
    assert [row[f"speed at {quality} dB"] for quality in (45, 40, 36)] == pytest.approx([3.75, 4.5, 5.1])
    assert row["ratio to residual"] == pytest.approx(1.5)
    assert row["least ratio"] == pytest.approx(1.5)
    # Between 50 and 26 dB, half of the way.
    assert row["worst image at 40 dB"] == pytest.approx(38.0)


def test_variants_differ_in_what_they_forecast():
    assert [config(0.016).target for config in VARIANTS.values()] == ["residual", "velocity", "noise", "velocity", "noise"]
    assert VARIANTS["noise, all else the same"](0.064).max_growth == VARIANTS["residual (the default)"](0.064).max_growth
