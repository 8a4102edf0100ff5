"""Random weights by name: they draw, call the transformer as often as they say, and refresh where they are told to."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.models import random_flux, random_qwen_image, random_wan
from bench.models.random_model import RANDOM
from bench.race.contender import Contender
from bench.race.contender_process import Racer, StepClock, check_forced, count_evaluations, pattern_of
from bench.race.contenders import contenders
from bench.race.subjects import Task, draw, image_tokens, load

pytestmark = pytest.mark.host
PATTERN = "FF.F..F...F."
TINY = [name for name in RANDOM if name.endswith("tiny")]
TWICE = [name for name in TINY if RANDOM[name].calls == 2]
# One of each family; what other packages' caches change of diffusers' classes stays in processes of their own.
IN_PROCESS = list({c.family: c for c in contenders() if c.force and c.module == "diffusers" and not c.is_compiled}.values())


def task_of(name: str, **changes: Any) -> Task:
    return Task(f"random:{name}", len(PATTERN), patterns={"": PATTERN}, backend="eager", **changes)


def count(pipe: Any, task: Task) -> list[float]:
    clock = StepClock(pipe.scheduler)
    return count_evaluations(pipe.transformer, clock, task.steps, lambda: draw(pipe, task, 0), calls=task.calls)


@pytest.mark.parametrize("name", TINY)
def test_random_weights_draw_by_seed_as_many_tokens_as_they_say(name: str):
    task = task_of(name)
    pipe = load(task)
    first, again, other = (draw(pipe, task, seed, steps=3) for seed in (0, 0, 1))
    assert np.isfinite(first).all()
    assert first.size == 64 * image_tokens(task)
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)
    larger = task._replace(resolution=2 * RANDOM[name].side)
    assert image_tokens(larger) == 4 * image_tokens(task)
    assert draw(pipe, larger, 0, steps=2).size == 64 * image_tokens(larger)
    # Somebody else's process draws the same.
    assert np.array_equal(draw(load(task), task, 0, steps=3), first)


@pytest.mark.parametrize(("module", "prefix"), [(random_flux, ""), (random_qwen_image, "qwen_image_"), (random_wan, "wan_")])
def test_sizes_keep_their_tokens(module: Any, prefix: str):
    """Results that are stored name a size, and are of so many tokens."""
    told = {name: size.tokens for name, size in module.SIZES.items()}
    assert told == {name: image_tokens(task_of(prefix + name)) for name in module.SIZES}


def test_flux_is_drawn_as_ever():
    size, task = random_flux.SIZES["tiny"], task_of("tiny")
    transformer = random_flux.make_transformer(dim=size.dim, double=size.double, single=size.single)
    before = random_flux.draw_random(random_flux.make_pipeline(transformer), size.tokens, seed=7, steps=3)
    assert np.array_equal(draw(load(task), task, 7, steps=3), before)


@pytest.mark.parametrize("name", TINY)
def test_the_transformer_is_called_as_often_as_they_say(name: str):
    task, calls = task_of(name), 0
    pipe = load(task)

    def count_call(*_: Any) -> None:
        nonlocal calls
        calls += 1

    pipe.transformer.register_forward_pre_hook(count_call)
    draw(pipe, task, 0, steps=5)
    assert calls == 5 * task.calls
    assert count(pipe, task) == [1.0] * task.steps


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("contender", IN_PROCESS, ids=lambda c: c.family)
def test_forced_contenders_refresh_both_calls_of_a_step(contender: Contender, name: str):
    task = task_of(name)
    pipe = load(task)
    assert contender.force is not None
    contender.force(pipe, PATTERN)
    for _ in range(2):
        shares = count(pipe, task)
        assert pattern_of(shares) == PATTERN
        # Half of the two blocks, where the first one always runs: of either call.
        cached = {share for share, kind in zip(shares, PATTERN, strict=True) if kind == "."}
        assert cached in ({0.0}, {0.5})


@pytest.mark.parametrize(
    ("contender", "name"),
    [
        ("AFCache balanced, compiled", "qwen_image_tiny"),
        ("AFCache balanced, compiled", "wan_tiny"),
        ("cache-dit + TaylorSeer 0.24", "qwen_image_tiny"),
        ("cache-dit 0.24, compiled", "wan_tiny"),
        ("ParaAttention 0.12", "wan_tiny"),
    ],
)
def test_contenders_that_are_forced_in_a_process_of_their_own(contender: str, name: str, tmp_path: Path):
    racer = Racer(contender, task_of(name), [0], tmp_path / "log", limit=300)
    ready = racer.start()
    assert ready is not None, racer.failure
    assert pattern_of(ready.evaluations[0]) == PATTERN
    cached = {share for share, kind in zip(ready.evaluations[0], PATTERN, strict=True) if kind == "."}
    assert cached == ({0.0} if "AFCache" in contender else {0.5})
    image = racer.draw(0)
    assert image is not None
    assert np.isfinite(image.pixels).all()
    assert len(image.step_seconds) == len(PATTERN)
    racer.finish()


def test_a_contender_that_refreshes_elsewhere_fails(tmp_path: Path):
    """Nobody can reuse at the first step."""
    task = Task("random:wan_tiny", 4, patterns={"": ".F.."}, backend="eager")
    racer = Racer("diffusers FirstBlockCache 0.12", task, [0], tmp_path / "log", limit=300)
    assert racer.start() is None
    assert racer.failure == "RuntimeError: told to refresh at .F.., it did at FF.."
    with pytest.raises(RuntimeError, match=r"told to refresh at F\.F, it did at F\.F, FFF"):
        check_forced("F.F", {"F.F", "FFF"})


def test_a_peer_without_support_says_why(tmp_path: Path):
    racer = Racer("ParaAttention 0.12", task_of("qwen_image_tiny"), [0], tmp_path / "log", limit=300)
    assert racer.start() is None
    assert racer.failure == "ValueError: Unknown pipeline class name: QwenImagePipeline"


@pytest.mark.parametrize("family", ["diffusers PyramidAttentionBroadcast", "diffusers FasterCache", "diffusers TaylorSeer"])
def test_caches_of_attention_find_attentions_of_videos(family: str):
    contender = next(c for c in contenders() if c.family == family and not c.is_compiled)
    task = task_of("wan_tiny")
    pipe = load(task)
    contender.enable(pipe, task)
    shares = count(pipe, task)
    assert shares[0] == 1.0
    # Of a block's three parts they leave at most the MLP.
    assert 0.3 < min(shares) < 1.0


def test_a_trained_video_is_called_twice_a_step():
    task = Task("mini-wan", 4)
    pipe = load(task)
    assert count(pipe, task) == [1.0] * 4
    assert draw(pipe, task, 3, steps=2).shape == (17, 32, 32, 3)
