"""Contenders start in processes that are forked from one that has imported everything."""

from collections.abc import Iterator

import pytest

from bench.race import contender_process
from tests.support.forked import prepare_forks


@pytest.fixture(autouse=True)
def forked_contenders() -> Iterator[None]:
    prepare_forks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contender_process, "START_METHOD", "forkserver")
        yield
