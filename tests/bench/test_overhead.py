"""What a cached step costs: every kind of step is timed, and its refreshes are the forced ones."""

import functools

import pytest
import torch

from afcache.runtime.compiled import CompileOptions
from bench.models.random_flux import make_transformer
from bench.scale import continuity_costs, step_costs
from bench.scale.step_costs import KINDS, STEPS, measure_steps

pytestmark = pytest.mark.host


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch) -> None:
    """Instead of twelve, which take a compiler for long; a refresh still takes longer than a cached step."""
    for module, double, single in ((step_costs, 2, 4), (continuity_costs, 1, 1)):
        make = functools.partial(make_transformer, double=double, single=single)
        monkeypatch.setattr(module, "make_transformer", lambda *, dim, make=make, **_: make(dim=dim))


def test_every_kind_of_step_is_measured_at_every_interval():
    rows = measure_steps(64, [4, 8], 1, dim=64, backend="eager")
    assert [(row["target"], row["compiled"], row["refresh every"]) for row in rows] == [
        (*kind, interval) for kind in KINDS for interval in (4, 8)
    ]
    # Two steps of warmup, and then every fourth or eighth of 28.
    assert [row["promised"] for row in rows] == pytest.approx([STEPS / 8, STEPS / 5] * len(KINDS))
    assert all(0 < row["cached / refresh (%)"] < 100 for row in rows)


def test_the_look_at_the_latents_is_measured_for_both_kinds_of_step(monkeypatch):
    monkeypatch.setattr(continuity_costs, "CompileOptions", lambda: CompileOptions(backend="eager"))
    with torch.no_grad():
        rows = continuity_costs.measure_continuity(64, 2)
    assert [row["forecast"] for row in rows] == ["noise", "residual"]
    assert all(float(row["cached step, ms"].split()[0]) > 0 for row in rows)
