"""Random sequences of what users do: the image is right, or there was an error."""

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.users import RAN, Users

_CHECKS: Any = list(HealthCheck)
# The long run has 300 (`python -m bench.user_sequences`).
SEQUENCES = int(os.environ.get("AFCACHE_SEQUENCES", "20"))
STEPS = 20


def search() -> BaseException | None:
    """What went wrong in the first sequence in which something did."""
    how = settings(
        max_examples=SEQUENCES,
        stateful_step_count=STEPS,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=_CHECKS,
        # A sequence takes seconds: making it shorter would take minutes.
        phases=[Phase.generate],
    )
    RAN.clear()
    try:
        run_state_machine_as_test(Users, settings=how)
    except Exception as error:
        return error
    return None


@pytest.mark.host
def test_no_sequence_of_actions_draws_a_wrong_image_in_silence():
    failure = search()
    if failure is not None:
        raise failure
    assert RAN["sequences"] >= SEQUENCES
    assert RAN["images"] > RAN["sequences"]
