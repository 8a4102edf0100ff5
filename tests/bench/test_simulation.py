"""Batchers by the clock of a simulation, against sums by hand."""

import pytest

from bench.load.simulation import BATCHERS, Arrival, Costs, one_state, own_states, uncached

COSTS = Costs(computed=1.0, cached=0.01)


def test_one_request_takes_its_own_steps():
    alone = [Arrival(5.0, "FF..F.")]
    assert uncached(alone, COSTS, 8) == pytest.approx([6.0])
    assert own_states(alone, COSTS, 8) == pytest.approx([3.03])
    assert one_state(alone, COSTS, 8) == pytest.approx([3.03])


def test_in_one_state_everybody_computes_what_one_must():
    both = [Arrival(0.0, "F.F."), Arrival(0.0, "FF..")]
    # Steps 0, 1 and 2 of both, and one cached call.
    assert one_state(both, COSTS, 8) == pytest.approx([6.01, 6.01])
    # Two and two of each, and what lies between.
    first, second = own_states(both, COSTS, 8)
    assert max(first, second) == pytest.approx(4.03)


def test_a_state_for_each_fills_calls_with_those_that_are_due():
    """Two begin together; the third comes while they compute, and shares their next call."""
    arrivals = [Arrival(0.0, "FF"), Arrival(0.0, "FF"), Arrival(1.0, "F.")]
    assert own_states(arrivals, COSTS, 8) == pytest.approx([2.0 + 3.01, 2.0 + 3.01, 2.0 + 3.01 - 1.0])


@pytest.mark.parametrize("name", BATCHERS)
def test_who_comes_first_is_served_first_where_calls_have_one_sample(name: str):
    arrivals = [Arrival(0.0, "FF"), Arrival(0.5, "FF")]
    first, second = BATCHERS[name](arrivals, COSTS, 1)
    assert first < second
    assert second == pytest.approx(3.5)
