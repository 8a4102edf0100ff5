"""Random sequences of what users do: the image is right, or there was an error."""

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.users import RAN, Users

# The long run has 300 (`python -m bench.user_sequences`).
_CHECKS: Any = list(HealthCheck)
SEQUENCES = int(os.environ.get("AFCACHE_SEQUENCES", "20"))


@pytest.mark.host
def test_no_sequence_of_actions_draws_a_wrong_image_in_silence():
    how = settings(
        max_examples=SEQUENCES,
        stateful_step_count=20,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=_CHECKS,
    )
    RAN.clear()
    run_state_machine_as_test(Users, settings=how)
    assert RAN["sequences"] >= SEQUENCES
    assert RAN["images"] > RAN["sequences"]
