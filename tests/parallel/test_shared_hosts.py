"""Models that diffusers or xfuser share out among processes draw with the cache what they draw without it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import afcache
from tests.support.parallel_hosts import SHARED, WRAPPERS, draw_one, kind_of
from tests.support.parallel_layouts import Met
from tests.support.zoo.everything import MIXED, difference

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900), pytest.mark.xdist_group("hosts")]
RanksOf = Callable[[str], list[Met]]
WAYS = ("diffusers, ulysses", "diffusers, ring", "xfuser")


def alone(name: str) -> torch.Tensor:
    """What one process draws."""
    kind = kind_of(name)
    pipe = kind.make()
    afcache.compile_pipeline(pipe, MIXED, compile=False)
    return draw_one(pipe, kind)


def told(ranks_of: RanksOf, way: str, name: str) -> list[dict[str, Any]]:
    return [rank.stories[way][name] for rank in ranks_of("hosts")]


@pytest.mark.parametrize(
    ("way", "name"),
    [(way, name) for way in WAYS for name in (WRAPPERS if way == "xfuser" else SHARED)],
)
def test_shared_models_draw_what_they_draw_alone(way: str, name: str, ranks_of: RanksOf):
    first, second = told(ranks_of, way, name)
    for rank in (first, second):
        assert rank["exact"] <= 1e-4
        # xfuser's Qwen-Image lets pixels attend to what fills up a prompt.
        if (way, name) != ("xfuser", "QwenImagePipeline"):
            assert difference(torch.tensor(rank["mixed"]), alone(name)) <= 1e-4
        assert {"F", "."} <= set(rank["pattern"])
    # Ranks decide by what they gathered, which is equal to the last bit.
    assert {"F", "."} <= set(first["decided"])
    assert first["decided"] == second["decided"]
    assert first["adaptive"] == second["adaptive"]
    assert first["mixed"] == second["mixed"]


@pytest.mark.parametrize(
    ("way", "name"),
    [(way, name) for way in WAYS for name in (WRAPPERS if way == "xfuser" else SHARED)],
)
def test_cached_steps_are_silent(way: str, name: str, ranks_of: RanksOf):
    for rank in told(ranks_of, way, name):
        branches = len(rank["sent"]) // len(rank["decided"])
        assert min(rank["own"]) > 0
        for index, messages in enumerate(rank["sent"]):
            computes = rank["decided"][index // branches] == "F"
            assert messages == (rank["own"][index] if computes else 0)


@pytest.mark.parametrize("way", ["diffusers, ulysses", "diffusers, ring"])
def test_parallelism_that_begins_after_compile_pipeline_is_refused_until_it_is_called_again(way: str, ranks_of: RanksOf):
    expected = alone("Flux2KleinPipeline")
    for rank in ranks_of("hosts"):
        met = rank.stories[way]["late"]
        assert met["error"].startswith("transformer.enable_parallelism was called after compile_pipeline")
        assert difference(torch.tensor(met["again"]), expected) <= 1e-4
        plain = draw_one(kind_of("Flux2KleinPipeline").make(), kind_of("Flux2KleinPipeline"))
        assert difference(torch.tensor(met["restored"]), plain) <= 1e-4
