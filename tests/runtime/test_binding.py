"""A transformer that torch.compile wraps after compile_pipeline: drawn by the cache as before, and found in the wrapper."""

from typing import Any

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters

import afcache
from tests.support.sampling import ADAPTIVE, largest_difference, sample

pytestmark = pytest.mark.host
STEPS = 8


def draw(pipe: Any, seed: int = 0) -> Any:
    return sample(pipe, seed, steps=STEPS)


@pytest.mark.parametrize("how", ["step", "blocks"])
def test_a_wrapper_around_a_cached_transformer_keeps_the_cache_and_everything_that_asks_for_it(short, how: Any):
    plain = draw(short)
    afcache.compile_pipeline(short, ADAPTIVE, compile=how, backend="eager")
    image, pattern = draw(short), afcache.report(short).pattern()
    with afcache.using(short, tolerance=0.5):
        bolder, bolder_pattern = draw(short), afcache.report(short).pattern()
    assert {"F", "."} <= set(pattern)
    assert pattern != bolder_pattern
    counters.clear()
    short.transformer = torch.compile(short.transformer, backend="eager")
    assert largest_difference(draw(short), image) < 1e-4
    assert not counters["stats"]
    assert afcache.report(short).pattern() == pattern
    with afcache.using(short, tolerance=0.5):
        assert largest_difference(draw(short), bolder) < 1e-4
    assert afcache.report(short).pattern() == bolder_pattern
    with afcache.uncached(short):
        assert largest_difference(draw(short), plain) < 1e-4
    with pytest.raises(NotImplementedError, match=r"transformer is a OptimizedModule.*transformer = pipe\.transformer\._orig"):
        afcache.compile_pipeline(short, ADAPTIVE)
    afcache.restore_pipeline(short)
    assert largest_difference(draw(short), plain) < 1e-4
    with pytest.raises(ValueError, match=r"was not passed to afcache\.compile_pipeline, or it was restored already"):
        afcache.report(short)


@torch.no_grad()
def test_a_wrapper_that_asks_for_one_graph_is_told_who_compiles(short):
    afcache.compile_pipeline(short, ADAPTIVE, compile=False)
    short.transformer = torch.compile(short.transformer, backend="eager", fullgraph=True)
    with pytest.raises(Unsupported, match=r"afcache compiles the step itself\. Leave fullgraph=True out"):
        draw(short)


@pytest.mark.parametrize("how", [False, "step"])
def test_compiled_in_place_after_the_pipeline_it_draws_as_before(short, how: Any):
    """Under compile="blocks" this is refused: there it would be the host's own forward."""
    afcache.compile_pipeline(short, ADAPTIVE, compile=how, backend="eager")
    image = draw(short)
    counters.clear()
    short.transformer.compile(backend="eager")
    assert largest_difference(draw(short), image) < 1e-4
    assert not counters["stats"]
    assert {"F", "."} <= set(afcache.report(short).pattern())
