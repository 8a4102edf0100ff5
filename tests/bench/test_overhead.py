"""What a cached step costs: every kind of step is timed, and its refreshes are the forced ones."""

import pytest

from bench.scale.step_costs import KINDS, STEPS, measure_steps

pytestmark = pytest.mark.host


def test_every_kind_of_step_is_measured_at_every_interval():
    rows = measure_steps(64, [4, 8], 1, dim=64, backend="aot_eager")
    assert [(row["target"], row["compiled"], row["refresh every"]) for row in rows] == [
        (*kind, interval) for kind in KINDS for interval in (4, 8)
    ]
    # Two steps of warmup, and then every fourth or eighth of 28.
    assert [row["promised"] for row in rows] == pytest.approx([STEPS / 8, STEPS / 5] * len(KINDS))
    assert all(0 < row["cached / refresh (%)"] < 100 for row in rows)
