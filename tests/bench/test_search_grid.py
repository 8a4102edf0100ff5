"""Ranking what a grid found: rules between cells, and speeds at equal quality."""

import json
from pathlib import Path

import pytest

from afcache.settings.presets import tuned
from bench import search_grid
from bench.search.grid import Found, read
from bench.search.rules import FOR_OUTPUTS, FOR_RESIDUALS, Curves, Rule, candidates, compare, curves_of, speeds_of

TOLERANCES, LIMITS, DAMPINGS = (0.016, 0.032, 0.064), (1.5, 2.5), (0.1, 0.3)


def cells(kind: str = "noise", model: str = "one", *, faster: float = 1.0) -> list[Found]:
    """Speed rises with the tolerance and the limit, quality falls with them; damping costs speed."""
    return [
        Found(kind, model, 28, 1.0, t, g, d, faster * (100 * t + g - d), 60 - 300 * t - 2 * g, 20.0)
        for t in TOLERANCES
        for g in LIMITS
        for d in DAMPINGS
    ]


@pytest.mark.parametrize(("rule", "target"), [(FOR_RESIDUALS, "residual"), (FOR_OUTPUTS, "noise"), (FOR_OUTPUTS, "velocity")])
def test_the_presets_rules_are_those_of_the_library(rule: Rule, target: str):
    for tolerance in (0.001, 0.016, 0.02, 0.05, 0.2):
        config = tuned(tolerance, target=target)  # pyright: ignore[reportArgumentType]
        assert rule.at(tolerance) == pytest.approx((config.max_growth, config.damping))


def test_a_curve_lies_between_the_cells_and_stops_at_their_edge():
    curves = Curves(cells())
    middle = curves.at(Rule(2.0, 0.0, 0.2, 0.0))
    assert [(point.speed, point.mean) for point in middle] == [
        pytest.approx((100 * t + 2.0 - 0.2, 60 - 300 * t - 4.0)) for t in TOLERANCES
    ]
    beyond, edge = curves.at(Rule(9.0, 0.0, 0.9, 0.0)), curves.at(Rule(2.5, 0.0, 0.3, 0.0))
    assert beyond == edge


def test_a_grid_with_a_hole_is_refused():
    with pytest.raises(ValueError, match=r"found must hold every cell of a grid of \(3, 2, 2\), got 11 cells"):
        Curves(cells()[1:])


def test_kinds_are_compared_place_by_place():
    found = cells() + cells(model="other") + cells("bolder", faster=1.5) + cells("bolder", "other", faster=1.2)
    base, bolder = (speeds_of(curves_of(found, kind), FOR_OUTPUTS) for kind in ("noise", "bolder"))
    assert set(base) == {("one", 28, 1.0), ("other", 28, 1.0)}
    row = compare(bolder, base)
    assert row["ratio to the old default"] == pytest.approx((1.5 * 1.2) ** 0.5)
    assert row["least"] == pytest.approx(1.2)
    assert compare(base, base)["ratio to the old default"] == pytest.approx(1.0)


def test_the_best_rule_of_a_kind_is_found_and_kinds_are_ranked(tmp_path: Path, monkeypatch):
    path = tmp_path / "drawn.jsonl"
    kinds = {search_grid.OLD: 1.0, "noise, exponent 1.5, weight 0.5": 1.4, "velocity, exponent 1.5, weight 0.5": 1.2}
    found = [each for kind, faster in kinds.items() for each in cells(kind, faster=faster)]
    # What was not drawn everywhere is not ranked.
    found += cells("half drawn", "nowhere else", faster=9.0)
    path.write_text("".join(json.dumps(each._asdict()) + "\n" for each in found))
    monkeypatch.setattr(search_grid.rules, "candidates", lambda: candidates()[::10])
    rows = search_grid.rank(path)
    assert [row["kind"] for row in rows[:3]] == [*list(kinds)[1:], search_grid.OLD]
    assert [row["note"] for row in rows[3:]] == ['policy "noise"', 'policy "velocity"', "the old default"]
    assert rows[-1]["ratio to the old default"] == pytest.approx(1.0)
    assert rows[0]["ratio to the old default"] >= rows[3]["ratio to the old default"] > 1.3


def test_what_was_drawn_is_kept():
    found = read(search_grid.DRAWN)
    assert {each.model for each in found} == set(search_grid.MODELS)
    places = len(search_grid.SETTINGS) * len(search_grid.MODELS)
    for kind in ("noise, exponent 1.5, weight 0.5", search_grid.OLD):
        assert sum(each.kind == kind for each in found) == places * len(search_grid.CELLS)
