"""What every way to call a pipeline owes: exact at tolerance 0, one graph with mixed decisions, eager's image."""

from typing import Any

import torch

import afcache
from afcache import CacheConfig
from tests.support.pipelines import Kind, draw

MIXED = CacheConfig(target="noise", tolerance=0.02, warmup_steps=2)


def counters() -> Any:
    return torch._dynamo.utils.counters


# Dynamo alone: for steps whose inputs differ by shape or value from those of a step that AOT looks at elsewhere.
TRACED = "eager"


def assert_exact_and_one_graph(pipe: Any, kind: Kind, *, backend: str = "aot_eager", **changes: Any) -> None:
    """At tolerance 0 what diffusers draws; with mixed decisions one graph, that draws what the eager step does."""
    assert_exact_and_share_a_graph([(pipe, kind, changes)], backend)


def assert_exact_and_share_a_graph(draws: list[tuple[Any, Kind, dict[str, Any]]], backend: str = "aot_eager") -> None:
    """The same of draws by one transformer, which one compiled step serves."""
    (first, *_), *_ = draws
    expected = [draw(pipe, kind, **changes) for pipe, kind, changes in draws]
    afcache.compile_pipeline(first, tolerance=0.0, compile=False)
    for (pipe, kind, changes), latents in zip(draws, expected, strict=True):
        exact = draw(pipe, kind, **changes)
        assert exact.shape == latents.shape
        assert (exact - latents).abs().max() < 1e-4, kind.name
        assert set(afcache.report(pipe).pattern()) == {"F"}
    afcache.compile_pipeline(first, MIXED, compile=False)
    eager = [draw(pipe, kind, **changes) for pipe, kind, changes in draws]
    counters().clear()
    afcache.compile_pipeline(first, MIXED, backend=backend)
    for (pipe, kind, changes), latents, close in zip(draws, expected, eager, strict=True):
        compiled = draw(pipe, kind, **changes)
        report = afcache.report(pipe)
        assert {"F", "."} <= set(report.pattern())
        assert {step.branch for step in report.steps} == ({0, 1} if "true_cfg_scale" in changes else {0})
        assert counters()["stats"]["unique_graphs"] == 1, kind.name
        assert not counters()["graph_break"]
        assert (compiled - close).abs().max() < 1e-4, kind.name
        assert (compiled - latents).abs().max() > 1e-6
