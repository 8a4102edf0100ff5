"""The rows of `bench.compare_targets`."""

import statistics
from pathlib import Path

import pytest

from bench.compare_targets import FEWER, SETTINGS, TAYLORSEER, VARIANTS, curves_of, means_of, rows_of
from bench.search.curves import Point
from bench.search.laboratory import Laboratory
from bench.search.setting import Setting


def curve(*points: tuple[float, float, float]) -> list[Point]:
    return [Point(speed, (best, worst)) for speed, best, worst in points]


CURVES = {
    "residual": [curve((2.0, 50.0, 50.0), (4.0, 30.0, 30.0))],
    "bolder": [curve((3.0, 50.0, 50.0), (6.0, 34.0, 26.0))],
    TAYLORSEER: [curve((1.5, 50.0, 50.0), (2.5, 30.0, 30.0)), curve((1.0, 50.0, 50.0), (5.0, 30.0, 30.0))],
}


def test_a_row_compares_speeds_at_equal_quality():
    first, bolder, taylorseer = rows_of("mini-flux", SETTINGS[0], CURVES)
    assert [bolder[f"speed at {quality} dB"] for quality in (45, 40, 36)] == pytest.approx([3.75, 4.5, 5.1])
    assert bolder["ratio to residual"] == pytest.approx(1.5)
    assert bolder["least ratio"] == pytest.approx(1.5)
    assert first["ratio to residual"] == pytest.approx(1.0)
    # Between 50 and 26 dB, half of the way.
    assert bolder["worst image at 40 dB"] == pytest.approx(38.0)
    # The faster warmup at each quality: 2, 3 and 3.8.
    assert [taylorseer[f"speed at {quality} dB"] for quality in (45, 40, 36)] == pytest.approx([2.0, 3.0, 3.8])
    assert bolder["least ratio to it"] == pytest.approx(5.1 / 3.8)
    assert taylorseer["worst image at 40 dB"] == pytest.approx(40.0)


def test_means_are_over_the_settings_of_a_model():
    rows = [*rows_of("one", SETTINGS[0], CURVES), *rows_of("one", SETTINGS[1], CURVES), *rows_of("other", SETTINGS[0], CURVES)]
    means = means_of(rows)
    assert [(row["model"], row["contender"], row["settings"]) for row in means[:4]] == [
        ("one", "residual", 2),
        ("one", "bolder", 2),
        ("one", TAYLORSEER, 2),
        ("other", "residual", 1),
    ]
    bolder = [row["ratio to residual"] for row in rows if row["contender"] == "bolder"]
    assert means[1]["ratio to residual"] == pytest.approx(statistics.geometric_mean(bolder))


def test_variants_differ_in_what_they_forecast():
    assert [config(0.016).target for config in VARIANTS.values()] == ["residual", "velocity", "noise", "velocity", "noise"]
    assert VARIANTS["noise, all else the same"](0.064).max_growth == VARIANTS["residual"](0.064).max_growth


@pytest.mark.host
def test_every_contender_is_drawn_and_counts_what_ran(tmp_path: Path):
    curves = curves_of(Laboratory([0, 1], tmp_path / "runs.jsonl"), Setting(8, 1.0), quick=True)
    assert list(curves) == [*VARIANTS, TAYLORSEER, FEWER]
    # diffusers forecasts the first step after 2 or 3 of warmup, and computes every third or fourth from the next one on.
    patterns = (("FF.F..F.", "FF.F...F"), ("FFF.F..F", "FFF.F..."))
    expected = [sorted(8 / pattern.count("F") for pattern in own) for own in patterns]
    assert [[point.speed for point in own] for own in curves[TAYLORSEER]] == expected
    assert [point.speed for point in curves[FEWER][0]] == pytest.approx([8 / 3, 8 / 2])
    assert all(point.mean > 12 for own in curves.values() for curve in own for point in curve)
