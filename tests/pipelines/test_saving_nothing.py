"""What is logged where the settings forecast no step."""

import pytest

from afcache import CacheConfig
from tests.pipelines.test_refusals import warnings_of
from tests.support.sampling import compiled, sample

pytestmark = pytest.mark.host


def test_a_run_of_which_nothing_can_be_saved_says_so_once(pipe):
    def draw() -> None:
        for steps in (6, 3, 2, 3):
            sample(pipe, steps=steps)

    compiled(pipe, CacheConfig(target="noise", tolerance=1.0))
    (message,) = warnings_of(draw)
    assert message.startswith("All 3 steps of this image are computed")
    assert warnings_of(draw) == []
    # Nothing is promised, and where error control decides, that is not known before.
    compiled(pipe, CacheConfig(policy="none"))
    assert warnings_of(draw) == []
    compiled(pipe, CacheConfig(target="noise", tolerance=0.0))
    assert warnings_of(lambda: sample(pipe, steps=4)) == []
