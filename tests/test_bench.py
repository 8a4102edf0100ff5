"""The benchmarks' own parts: what they report must be what the pipeline does."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import afcache
from afcache import CacheConfig
from bench import closed_loop
from bench.laboratory import Laboratory, Point, Setting, speed_at, worst_at
from bench.mini_sampling import decode, draw, prepare
from bench.search_policy import BASE
from tests.sampling import largest_difference

pytestmark = pytest.mark.host
CONFIG = CacheConfig(tolerance=0.02, warmup_steps=2)
SEEDS = [0, 3, 14]


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_the_closed_loop_is_the_pipelines_own(pipe, cfg: float):
    """Seed by seed: the same decisions and latents, though its stack runs for some samples only."""
    problem = prepare(pipe, SEEDS, cfg=cfg)
    loop = closed_loop.sample(pipe.transformer, problem, CONFIG)
    afcache.compile_pipeline(pipe, CONFIG, compile=False)
    for i, seed in enumerate(SEEDS):
        latents = draw(pipe, seed, cfg=cfg, output_type="latent")
        pattern = "".join("F" if refresh else "." for refresh in loop.refreshes[:, i].tolist())
        assert pattern == afcache.report(pipe).pattern()
        assert largest_difference(latents, loop.latents[i].numpy()) < 1e-4


def test_decoded_latents_are_the_pipelines_images(pipe):
    problem = prepare(pipe, [2], steps=4)
    assert largest_difference(decode(pipe, problem.latents)[0], draw(pipe, 2, steps=4)) < 1e-6


def test_the_surprise_signal_only_adds_refreshes(pipe):
    problem = prepare(pipe, SEEDS)
    settings = dataclasses.replace(CONFIG, tolerance=0.05)
    alone = closed_loop.sample(pipe.transformer, problem, settings)
    surprised = closed_loop.sample(pipe.transformer, problem, settings, use_surprise=True)
    assert int(surprised.refreshes.sum()) >= int(alone.refreshes.sum())
    assert not torch.equal(surprised.latents, alone.latents)


def test_the_laboratory_remembers_what_it_has_measured(tmp_path: Path):
    runs, setting = tmp_path / "runs.jsonl", Setting(6, 1.0)
    first = Laboratory([0, 1], runs).evaluate(BASE, setting)
    resumed = Laboratory([0, 1], runs)
    resumed._problem = lambda _: pytest.fail("sampled again")  # pyright: ignore[reportAttributeAccessIssue]
    assert resumed.evaluate(BASE, setting) == first
    assert len(first.psnr) == 2
    assert [json.loads(line)["speed"] for line in runs.read_text().splitlines()] == [first.speed]


CURVE = [Point(2.0, (50.0, 46.0)), Point(3.0, (40.0, 36.0)), Point(4.0, (30.0, 30.0))]


@pytest.mark.parametrize(("quality", "speed"), [(60.0, 1.0), (48.0, 2.0), (43.0, 2.5), (34.0, 3.5), (30.0, 4.0), (20.0, 4.0)])
def test_speed_at_interpolates_and_never_extrapolates(quality: float, speed: float):
    assert speed_at(CURVE, quality) == pytest.approx(speed)


def test_worst_at_is_the_worst_seed_between_the_points():
    assert worst_at(CURVE, 2.5) == pytest.approx(41.0)
