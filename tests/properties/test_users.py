"""Random sequences of what users do: the image is right, or there was an error."""

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.users import RAN, Users

_CHECKS: Any = list(HealthCheck)
STEPS = 20


def search(sequences: int, *, start: int = 0) -> BaseException | None:
    """What went wrong in the first sequence in which something did.

    Args:
        sequences: how many are tried.
        start: another number, other sequences.

    """
    how = settings(
        max_examples=sequences,
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=_CHECKS,
        # A sequence takes seconds: making it shorter would take minutes.
        phases=[Phase.generate],
    )
    RAN.clear()
    try:
        run_state_machine_as_test(seed(start)(Users), settings=how)
    except Exception as error:
        return error
    return None


@pytest.mark.host
def test_no_sequence_of_actions_draws_a_wrong_image_in_silence():
    failure = search(sequences := 12)
    if failure is not None:
        raise failure
    assert RAN["sequences"] >= sequences
    assert RAN["images"] > RAN["sequences"]
