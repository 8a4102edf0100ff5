"""What compile_pipeline compiles: one graph for every prompt, step count and decision; one more for a new kind of shape."""

import math
from typing import Any

import pytest
import torch

import afcache
from tests.support.sampling import ADAPTIVE, PROMPT, compiled, largest_difference, sample

pytestmark = pytest.mark.host


@pytest.mark.parametrize(
    ("backend", "tolerance"), [("aot_eager", 1e-4), pytest.param("inductor", 2e-3, marks=pytest.mark.compile)]
)
def test_everything_is_one_graph(short, backend: str, tolerance: float):
    """Prompts, seeds, step counts, guidance on and off, and what is decided: one graph, no break, eager's decisions."""
    runs: list[dict[str, Any]] = [
        {"steps": 28},
        {"steps": 20, "prompt": "a handwritten two on a palace"},
        {"steps": 20, "cfg": 2.0},
        {"steps": 28, "prompt": "a handwritten nine on a palace", "seed": 5},
    ]
    compiled(short)
    expected = []
    for options in runs:
        latents = sample(short, **options, output_type="latent")
        expected.append((latents, afcache.report(short).pattern()))
    afcache.compile_pipeline(short, ADAPTIVE, backend=backend)
    for options, (latents, pattern) in zip(runs, expected, strict=True):
        result = sample(short, **options, output_type="latent")
        assert afcache.report(short).pattern() == pattern
        assert set(pattern) == {"F", "."}
        assert largest_difference(result, latents) < tolerance
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert math.isfinite(afcache.report(short).seconds(is_computed=False))


def test_a_new_kind_of_shape_adds_one_graph_and_the_next_of_its_kind_none(short):
    afcache.compile_pipeline(short, ADAPTIVE, backend="eager")
    sample(short, steps=3)
    expected = 1
    kinds: list[list[dict[str, Any]]] = [
        [{"height": 48, "width": 48}, {"height": 64, "width": 48}],
        [{"seed": [0, 1], "prompt": [PROMPT] * 2}, {"seed": [0, 1, 2], "prompt": [PROMPT] * 3}],
    ]
    for shapes in kinds:
        expected += 1
        for options in shapes:
            sample(short, steps=3, **options)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= expected, options
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(
    "options", [{"compile": False}, {"backend": "aot_eager", "dynamic": False}], ids=["eager", "fixed shape"]
)
def test_cached_steps_keep_the_history_where_it_is(short, options: dict[str, Any]):
    """The runtime owns its states, so a step of fixed shape writes into them instead of copying them."""
    pointers = set()
    afcache.compile_pipeline(short, ADAPTIVE, **options)

    def look(pipe: Any, step: int, timestep: torch.Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
        del step, timestep
        pointers.add(pipe.transformer._afcache.last_trajectory(pipe).present[0].states[0].history.data_ptr())
        return arguments

    sample(short, callback_on_step_end=look)
    assert set(afcache.report(short).pattern()) == {"F", "."}
    assert len(pointers) == 1
