"""Searching for settings: what a search counts must be what the pipeline does, and what it concludes follows from it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import afcache
from afcache import CacheConfig, policy
from afcache.functional.model import Part, model_of
from afcache.models.flux1.architecture import FLUX, PARTS
from bench.compare_strategies import _frontier
from bench.mini_flux.sampling import decode, draw, prepare
from bench.search import closed_loop
from bench.search.curves import Point, speed_at, worst_at
from bench.search.families import Family, families
from bench.search.grid import Cell, Grid, Kind, read
from bench.search.laboratory import Laboratory, block_flops
from bench.search.setting import Setting
from bench.search.strategies import Curve, claim
from bench.search_policy import BASE
from tests.support.sampling import largest_difference

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


@pytest.mark.parametrize(
    ("config", "cfg"),
    [
        (policy("dbcache", first_blocks=3, last_blocks=2, warmup_steps=3, threshold=0.2), 1.0),
        (policy("teacache", correction=True), 2.0),
        (policy("noise"), 1.0),
        (policy("velocity", tolerance=0.032), 2.0),
        (policy("spectrum"), 1.0),
        (policy("layerwise", attention_threshold=0.04), 2.0),
    ],
    ids=["dbcache", "teacache", "noise", "velocity", "spectrum", "layerwise"],
)
def test_other_policies_loops_are_the_pipelines_too_and_count_its_blocks(pipe, config: CacheConfig, cfg: float):
    problem = prepare(pipe, SEEDS, cfg=cfg)
    loop = closed_loop.sample(pipe.transformer, problem, config)
    afcache.compile_pipeline(pipe, config, compile=False)
    ran = mlps = 0
    for i, seed in enumerate(SEEDS):
        latents = draw(pipe, seed, cfg=cfg, output_type="latent")
        assert largest_difference(latents, loop.latents[i].numpy()) < 1e-3
        report = afcache.report(pipe)
        ran, mlps = ran + report.block_evaluations, mlps + report.mlp_evaluations
    assert (int(loop.runs.sum()), int(loop.mlp_runs.sum())) == (ran, mlps)


@torch.no_grad()
def test_operations_of_a_block_are_those_that_torch_counts(pipe):
    """The linear layers'; attention, which torch counts by the kernel, has its closed form."""
    (inputs,) = prepare(pipe, [0], steps=1).branches
    whole, without_attention = block_flops(pipe.transformer, inputs)
    attention = 4 * 80**2 * 96
    embedded = PARTS.open(pipe.transformer, inputs, FLUX.embed(pipe.transformer, inputs))
    temb = FLUX.embed(pipe.transformer, inputs).temb
    for index in (0, 11):
        counts = []
        for reused in (None, torch.zeros(1, 1, 80, 96)):
            with FlopCounterMode(display=False) as counter:
                model = model_of(pipe.transformer, FLUX, _zero_attention)
                PARTS.run(model, inputs, embedded, temb, Part(index, index + 1), reused)
            counts.append(counter.get_total_flops())
        assert float(whole[index]) == counts[0] + attention
        assert float(without_attention[index]) == counts[1]


def _zero_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    del query, key
    return torch.zeros_like(value)


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


def test_a_familys_curve_holds_the_points_that_no_other_beats():
    points = [Point(2.0, (50.0,)), Point(3.0, (40.0,)), Point(2.5, (39.0,)), Point(3.0, (38.0,)), Point(1.5, (50.0,))]
    assert _frontier(points) == [Point(2.0, (50.0,)), Point(3.0, (40.0,))]


def test_the_claim_names_the_best_single_strategy_with_and_without_our_correction():
    def curve(name: str, kind: str, speed: float) -> Curve:
        points = [Point(1.0, (60.0,)), Point(speed, (40.0,)), Point(speed + 1, (30.0,))]
        return Curve(Setting(28, 1.0), Family(name, kind, ()), points)

    rows = claim(
        [
            curve("AFCache, default", "ours", 4.0),
            curve("a", "single", 2.0),
            curve("b", "single", 2.5),
            curve("b + correction", "corrected", 5.0),
        ]
    )
    assert [row["PSNR (dB)"] for row in rows] == [40, 35]
    assert rows[0]["which"] == "b"
    assert rows[0]["ratio (claim: 1.2)"] == pytest.approx(1.6)
    assert rows[0]["ratio (claim: 1)"] == pytest.approx(0.8)
    assert rows[1]["adaptive default"] == pytest.approx(4.5)


def test_every_family_is_a_set_of_valid_settings_of_one_kind():
    found = families(28)
    assert {family.kind for family in found} == {"ours", "single", "corrected", "control"}
    singles = [family for family in found if family.kind == "single"]
    corrected = [family for family in found if family.kind == "corrected"]
    assert len(singles) == len(corrected) == 10
    for family, twin in zip(singles, corrected, strict=True):
        assert not any(config.correction for config in family.configs)
        assert all(config.correction for config in twin.configs)


CURVE = [Point(2.0, (50.0, 46.0)), Point(3.0, (40.0, 36.0)), Point(4.0, (30.0, 30.0))]


@pytest.mark.parametrize(("quality", "speed"), [(60.0, 1.0), (48.0, 2.0), (43.0, 2.5), (34.0, 3.5), (30.0, 4.0), (20.0, 4.0)])
def test_speed_at_interpolates_and_never_extrapolates(quality: float, speed: float):
    assert speed_at(CURVE, quality) == pytest.approx(speed)


def test_worst_at_is_the_worst_seed_between_the_points():
    assert worst_at(CURVE, 2.5) == pytest.approx(41.0)


def test_settings_that_share_a_batch_are_evaluated_as_they_are_alone(tmp_path: Path):
    configs = [
        dataclasses.replace(policy("noise"), tolerance=t, max_growth=g) for t, g in ((0.01, 1.5), (0.05, 2.5), (0.1, 3.0))
    ]
    setting = Setting(12, 2.0)
    together = Laboratory([0, 3], tmp_path / "together.jsonl").evaluate_all(configs, setting)
    alone = Laboratory([0, 3], tmp_path / "alone.jsonl")
    for config, point in zip(configs, together, strict=True):
        expected = alone.evaluate(config, setting)
        assert (point.speed, point.flops) == pytest.approx((expected.speed, expected.flops))
        assert point.psnr == pytest.approx(expected.psnr, abs=0.1)
    assert len({point.speed for point in together}) > 1


def test_a_grid_finds_what_a_laboratory_finds(tmp_path: Path):
    kind, cells = Kind("noise", policy("noise")), [Cell(0.02, 1.5, 0.1), Cell(0.08, 2.5, 0.25)]
    grid = Grid("mini-flux", [0, 3], tmp_path / "grid.jsonl")
    grid.draw(kind, Setting(12, 1.0), cells)
    grid.draw(kind, Setting(12, 1.0), cells)
    found = read(tmp_path / "grid.jsonl")
    laboratory = Laboratory([0, 3], tmp_path / "runs.jsonl")
    assert len(found) == 2
    for cell, its in zip(cells, found, strict=True):
        point = laboratory.evaluate(dataclasses.replace(kind.config, **cell._asdict()), Setting(12, 1.0))
        assert its.speed == pytest.approx(point.speed)
        assert (its.psnr, its.worst) == pytest.approx((point.mean, point.worst), abs=0.1)


def test_another_tau_holds_inside_of_its_grid_alone(tmp_path: Path):
    cells = [Cell(0.05, 2.5, 0.1)]
    grid = Grid("mini-flux", [0], tmp_path / "grid.jsonl")
    for kind in (Kind("ours", policy("noise")), Kind("other", policy("noise"), tau=2.5), Kind("again", policy("noise"))):
        grid.draw(kind, Setting(12, 1.0), cells)
    ours, other, again = read(tmp_path / "grid.jsonl")
    assert ours.psnr == again.psnr != other.psnr


def test_settings_whose_groups_run_by_themselves_are_drawn_alone(tmp_path: Path):
    configs = [policy("layerwise", tolerance=tolerance, groups=2) for tolerance in (0.005, 0.1)]
    setting = Setting(10, 1.0)
    together = Laboratory([0], tmp_path / "together.jsonl").evaluate_all(configs, setting)
    alone = [Laboratory([0], tmp_path / f"{index}.jsonl").evaluate(config, setting) for index, config in enumerate(configs)]
    assert together == alone
    assert together[0].speed != together[1].speed
