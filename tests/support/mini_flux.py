"""mini-FLUX for tests: loaded once a process, and copied for each that asks."""

import copy
import functools
from typing import Any

import afcache


@functools.cache
def _loaded() -> Any:
    pipe = afcache.load_mini_flux()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fresh_mini_flux() -> Any:
    """A pipeline of one's own, to be changed for good."""
    return copy.deepcopy(_loaded())
