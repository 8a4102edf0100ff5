"""The rows of `bench.few_steps`."""

from pathlib import Path

import pytest

from bench.few_steps import pooled_psnr, row_of, rows_of
from bench.search.curves import Point
from bench.search.laboratory import Laboratory
from bench.search.setting import Setting


def test_equal_images_do_not_lift_the_mean():
    assert pooled_psnr([40.0, 40.0]) == pytest.approx(40.0)
    # Half of the images without an error halve the mean squared error.
    assert pooled_psnr([40.0, 150.0]) == pytest.approx(43.01, abs=0.01)


@pytest.mark.host
def test_a_preset_stands_beside_as_many_steps_and_beside_itself_without_the_rules(tmp_path: Path):
    setting, known = Setting(10, 1.0), Laboratory([0, 1], tmp_path / "now.jsonl")
    quality, balanced, fast = rows_of(known, Laboratory([0, 1], tmp_path / "before.jsonl"), setting)
    assert [row["preset"] for row in (quality, balanced, fast)] == ["quality", "balanced", "fast"]
    assert 3 <= balanced["computed steps"] < balanced["without the rules: computed steps"]
    assert balanced["computed steps"] == pytest.approx(10 / balanced["fewer block evaluations"])
    assert balanced["PSNR (dB)"] > balanced["their PSNR (dB)"] + 5
    assert balanced["as many steps"] - 1 < balanced["computed steps"] <= balanced["as many steps"]


@pytest.mark.host
def test_all_steps_computed_have_no_rival(tmp_path: Path):
    whole = Point(1.0, (150.0, 150.0))
    row = row_of(Laboratory([0, 1], tmp_path / "runs.jsonl"), Setting(4, 1.0), "quality", whole, whole)
    assert (row["their PSNR (dB)"], row["equal images"], row["as many steps"]) == ("-", 2, 4)
