"""Every pipeline class that runs a FLUX.1 transformer: exact at tolerance 0, one graph with mixed decisions."""

from typing import Any

import pytest
import torch

import afcache
from afcache import CacheConfig
from tests.pipelines import BY_NAME, KINDS, Kind, draw, make

pytestmark = pytest.mark.host
MIXED = CacheConfig(tolerance=0.02, warmup_steps=2)


def counters() -> Any:
    return torch._dynamo.utils.counters


def assert_exact_and_one_graph(pipe: Any, kind: Kind, **changes: Any) -> None:
    """At tolerance 0 what diffusers draws; with mixed decisions one graph, that draws what the eager step does."""
    expected = draw(pipe, kind, **changes)
    afcache.compile_pipeline(pipe, tolerance=0.0, compile=False)
    exact = draw(pipe, kind, **changes)
    assert exact.shape == expected.shape
    assert (exact - expected).abs().max() < 1e-4
    assert set(afcache.report(pipe).pattern()) == {"F"}
    afcache.compile_pipeline(pipe, MIXED, compile=False)
    eager = draw(pipe, kind, **changes)
    counters().clear()
    afcache.compile_pipeline(pipe, MIXED, backend="aot_eager")
    compiled = draw(pipe, kind, **changes)
    report = afcache.report(pipe)
    assert set(report.pattern()) == {"F", "."}
    assert report.state_bytes > 0
    assert counters()["stats"]["unique_graphs"] == 1
    assert not counters()["graph_break"]
    assert (compiled - eager).abs().max() < 1e-4
    assert (compiled - expected).abs().max() > 1e-6


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_pipelines(kind: Kind):
    assert_exact_and_one_graph(make(kind), kind)
