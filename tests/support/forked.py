"""Processes of tests: forked from one that has imported, once, what takes each of them ten seconds to import."""

import multiprocessing
from multiprocessing.context import ForkServerContext

IMPORTED = ["tests.support.parallel_worker", "bench.race.contender_process"]


def prepare_forks() -> ForkServerContext:
    """What starts them; the process that they are forked from starts with the first."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(IMPORTED)
    return fork
