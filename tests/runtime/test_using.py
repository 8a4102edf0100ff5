"""afcache.using: another tolerance inside a block, for all images or for each of a batch, by the graph that there is."""

import contextlib
import copy
import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline

import afcache
from afcache import PRESETS, CacheConfig, policy
from afcache.settings.presets import tuned
from tests.support.sampling import ADAPTIVE, PROMPT, compiled, largest_difference, sample

pytestmark = pytest.mark.host
STEPS = 16
PAIR: dict[str, Any] = {"seed": [0, 3], "prompt": [PROMPT, "a handwritten three on a palace"]}
OWN = CacheConfig(tolerance=0.02, warmup_steps=2, max_growth=2.5, damping=0.1)
GROUPS = policy("layerwise", groups=2)
BOUND = PRESETS["balanced"]


def draw(pipe: Any, **options: Any) -> tuple[np.ndarray, list[tuple[bool, ...]]]:
    """Latents, and what was decided for each image at each step."""
    latents = sample(pipe, **{"steps": STEPS, "output_type": "latent", **options})
    return latents, [step.refreshed for step in afcache.report(pipe).steps]


def refreshes(decisions: list[tuple[bool, ...]], image: int = 0) -> int:
    return sum(flags[image] for flags in decisions)


def is_same(first: tuple[np.ndarray, Any], second: tuple[np.ndarray, Any]) -> bool:
    return np.array_equal(first[0], second[0]) and first[1] == second[1]


def graphs() -> int:
    assert not torch._dynamo.utils.counters["graph_break"]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


CHANGES: dict[str, tuple[CacheConfig, dict[str, Any], CacheConfig]] = {
    "tolerance": (BOUND, {"tolerance": 0.05}, tuned(0.05)),
    "zero": (BOUND, {"tolerance": 0}, tuned(0)),
    "preset": (BOUND, {"preset": "fast"}, PRESETS["fast"]),
    "config": (BOUND, {"config": dataclasses.replace(BOUND, damping=0.0, max_growth=math.inf)}, BOUND),
    "own settings": (OWN, {"tolerance": 0.06}, dataclasses.replace(OWN, tolerance=0.06)),
    "own settings, preset": (OWN, {"preset": "fast"}, dataclasses.replace(OWN, tolerance=0.032)),
    "groups": (GROUPS, {"tolerance": 0.05}, policy("layerwise", groups=2, tolerance=0.05)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_inside_the_block_images_are_those_of_a_pipeline_with_these_settings(pipe, name: str):
    bound, changes, expected = CHANGES[name]
    expected = changes.get("config", expected)
    plain, changed = draw(compiled(pipe, bound)), draw(compiled(pipe, expected))
    assert plain[1] != changed[1] or "config" in changes
    compiled(pipe, bound)
    with afcache.using(pipe, **changes):
        assert is_same(draw(pipe), changed)
        assert afcache.report(pipe).config == expected.to_dict()
        assert is_same(draw(pipe), changed)
    assert afcache.report(pipe).config == expected.to_dict()
    assert is_same(draw(pipe), plain)
    assert afcache.report(pipe).config == bound.to_dict()


@pytest.mark.parametrize("options", [{}, {"decide_ahead": True}, {"cfg": 2.0}], ids=["plain", "ahead", "guidance"])
def test_each_image_of_a_batch_is_drawn_by_its_own_tolerance(pipe, options: dict[str, Any]):
    """With guidance one for each image, not for each branch; deciding ahead reads rows of several tolerances."""
    how = {name: options[name] for name in options if name == "decide_ahead"}
    calls = {name: options[name] for name in options if name == "cfg"}
    compiled(pipe, BOUND, **how)
    both = []
    for tolerance in (0.002, 0.06):
        with afcache.using(pipe, tolerance=tolerance):
            both.append(draw(pipe, **PAIR, **calls))
    with afcache.using(pipe, tolerance=[0.002, 0.06]):
        latents, decisions = draw(pipe, **PAIR, **calls)
    for image, (expected, decided) in enumerate(both):
        assert [flags[image] for flags in decisions] == [flags[image] for flags in decided]
        assert largest_difference(latents[image], expected[image]) < 1e-5
    assert refreshes(decisions, 0) > refreshes(decisions, 1)
    report = afcache.report(pipe)
    assert report.config["tolerance"] == (0.002, 0.06)
    assert report.config["max_growth"] == (tuned(0.002).max_growth, tuned(0.06).max_growth)
    assert report.config["damping"] == (tuned(0.002).damping, tuned(0.06).damping)


def test_the_report_says_the_tolerances_that_were_drawn_with(pipe, tmp_path):
    compiled(pipe, BOUND)
    with afcache.using(pipe, tolerance=(0.008, 0.016)):
        draw(pipe, **PAIR)
    report = afcache.report(pipe)
    assert "AFCache (tolerance 0.008 to 0.016, order 1, independent decisions)" in str(report)
    assert "at most between refreshes (tolerance 0.008 to 0.016)" in str(report)
    # The two have these in common.
    assert (report.config["max_growth"], report.config["damping"]) == (1.5, 0.2)
    report.plot(tmp_path / "report.png")
    report.to_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["config"]["tolerance"] == [0.008, 0.016]


@pytest.mark.parametrize(("backend", "cfg"), [("eager", 1.0), ("aot_eager", 2.0)])
def test_no_change_of_tolerance_compiles_anything(short, backend: str, cfg: float):
    """A number, one for each image, and back: one graph, which draws what the eager step does."""
    changes: list[dict[str, Any]] = [
        {"tolerance": 0.05},
        {"tolerance": [0.002, 0.06]},
        {"preset": "fast"},
        {"tolerance": 0},
        {"config": dataclasses.replace(BOUND, damping=0.0, max_growth=math.inf)},
    ]

    def draw_all() -> list[tuple[np.ndarray, Any]]:
        drawn = [draw(short, **PAIR, cfg=cfg)]
        for change in changes:
            with afcache.using(short, **change):
                drawn.append(draw(short, **PAIR, cfg=cfg))
        return [*drawn, draw(short, **PAIR, cfg=cfg)]

    compiled(short, BOUND)
    expected = draw_all()
    afcache.compile_pipeline(short, BOUND, backend=backend)
    found = draw_all()
    assert graphs() == 1
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0
    for (latents, decisions), (close, decided) in zip(found, expected, strict=True):
        assert decisions == decided
        assert largest_difference(latents, close) < 1e-4
    assert is_same(found[0], found[-1])
    assert len({str(decisions) for _, decisions in found}) >= 4


def test_blocks_nest_and_end_by_exceptions_too(pipe):
    compiled(pipe, BOUND)

    def tolerance() -> float:
        sample(pipe, steps=1, output_type="latent")
        return afcache.report(pipe).config["tolerance"]

    with afcache.using(pipe, tolerance=0.03):
        with afcache.using(pipe, preset="quality"), afcache.uncached(pipe):
            pass
        with afcache.using(pipe, tolerance=0.5):
            assert tolerance() == 0.5
        with pytest.raises(KeyError, match="inside"), afcache.using(pipe, tolerance=0.5):
            raise KeyError("inside")
        assert tolerance() == 0.03
        with pytest.raises(ValueError, match="tolerance must be"), afcache.using(pipe, tolerance=-1):
            pass
        assert tolerance() == 0.03
    assert tolerance() == BOUND.tolerance


def test_an_image_that_is_under_way_keeps_its_settings_until_its_end(pipe):
    compiled(pipe, BOUND)
    plain = draw(pipe)
    with afcache.using(pipe, tolerance=0.0):
        careful = draw(pipe)
    stack = contextlib.ExitStack()

    def enter(_pipe, step: int, _timestep, arguments: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            stack.enter_context(afcache.using(pipe, tolerance=0.0))
        return arguments

    def leave(_pipe, step: int, _timestep, arguments: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            stack.close()
        return arguments

    assert is_same(draw(pipe, callback_on_step_end=enter), plain)
    assert is_same(draw(pipe, callback_on_step_end=leave), careful)
    assert is_same(draw(pipe), plain)


def test_pipelines_come_and_go_inside_the_block(own):
    """Restored, compiled anew, copied: the block is for the settings that it was entered with."""
    compiled(own, BOUND)
    with afcache.using(own, tolerance=0.0):
        copied = copy.deepcopy(own)
        afcache.restore_pipeline(own)
        plain = sample(own, steps=6)
        compiled(own, OWN)
        sample(own, steps=6)
        assert afcache.report(own).config == OWN.to_dict()
        sample(copied, steps=6)
        assert afcache.report(copied).config == BOUND.to_dict()
    afcache.restore_pipeline(own)
    assert np.array_equal(sample(own, steps=6), plain)
    with afcache.using(copied, tolerance=0.0):
        afcache.restore_pipeline(copied)
    assert np.array_equal(sample(copied, steps=6), plain)


def test_the_block_is_for_every_pipeline_that_shares_the_transformer(own):
    compiled(own, BOUND)
    other = FluxImg2ImgPipeline.from_pipe(own)
    with afcache.using(other, tolerance=0.5):
        sample(own, steps=6)
    assert afcache.report(own).config["tolerance"] == 0.5


EITHER = r"tolerance must be a number, or a list of one for each image, got "
REFUSED: list[tuple[CacheConfig, dict[str, Any], type[Exception], str]] = [
    (BOUND, {"tolerance": -0.1}, ValueError, r"tolerance must be finite and >= 0, got -0\.1; 0 computes every step"),
    (BOUND, {"tolerance": math.nan}, ValueError, r"tolerance must be finite and >= 0, got nan"),
    (BOUND, {"tolerance": math.inf}, ValueError, r"tolerance must be finite and >= 0, got inf"),
    (BOUND, {"tolerance": "0.1"}, TypeError, EITHER + r"'0\.1'"),
    (BOUND, {"tolerance": True}, TypeError, r"tolerance must be a number, got True"),
    (BOUND, {"tolerance": torch.tensor([0.1])}, TypeError, EITHER + r"tensor.*value\.tolist\(\) is a plain one"),
    (BOUND, {"tolerance": []}, ValueError, EITHER + r"\[\]: it has none"),
    (BOUND, {"tolerance": [0.1, -1]}, ValueError, r"tolerance\[1\] must be finite and >= 0, got -1"),
    (BOUND, {"tolerance": [0.1, "a"]}, TypeError, r"tolerance\[1\] must be a number, got 'a'"),
    (BOUND, {"preset": "faster"}, ValueError, r"preset must be one of 'quality', 'balanced', 'fast', got 'faster'"),
    (BOUND, {}, ValueError, r"exactly one of config, tolerance and preset must be given, got none"),
    (BOUND, {"tolerance": 0.1, "preset": "fast"}, ValueError, r"exactly one .* got tolerance=0\.1 and preset='fast'"),
    (BOUND, {"config": "fast"}, TypeError, r"config must be an afcache\.CacheConfig, got 'fast'"),
    (
        BOUND,
        {"config": dataclasses.replace(BOUND, order=2, warmup_steps=5)},
        ValueError,
        r"in tolerance, max_growth, damping alone, got warmup_steps=5 \(compiled: 2\), order=2 \(compiled: 1\)\. Call "
        r"afcache\.compile_pipeline\(pipe, config\), or change the tolerance alone, .*: afcache\.using\(pipe, tolerance=0\.0",
    ),
    (policy("teacache"), {"tolerance": 0.1}, ValueError, r"policy 'teacache', which has no tolerance.*compile_pipeline"),
    (policy("none"), {"preset": "fast"}, ValueError, r"policy 'none', which has no tolerance"),
]


@pytest.mark.parametrize(("bound", "changes", "error", "message"), REFUSED)
def test_what_cannot_be_drawn_with_is_refused(pipe, bound: CacheConfig, changes: dict[str, Any], error: Any, message: str):
    compiled(pipe, bound)
    with pytest.raises(error, match=message), afcache.using(pipe, **changes):
        pass
    assert pipe.transformer._afcache.in_use is None


def test_a_pipeline_that_is_not_cached_is_refused(pipe):
    with pytest.raises(ValueError, match=r"was not passed to afcache\.compile_pipeline"), afcache.using(pipe, tolerance=0.1):
        pass


@pytest.mark.parametrize("options", [{}, {"cfg": 2.0}], ids=["one branch", "guidance"])
def test_as_many_tolerances_as_the_batch_has_images_are_asked_for(pipe, options: dict[str, Any]):
    compiled(pipe, ADAPTIVE)
    message = (
        r"one for each image of the batch \(not for each guidance branch\), which is 2, got 3: \[0\.1, 0\.2, 0\.3\]\. Pass 2"
    )
    with afcache.using(pipe, tolerance=[0.1, 0.2, 0.3]):
        with pytest.raises(ValueError, match=message):
            draw(pipe, **PAIR, **options)
        # One would do for all, but a list says one for each.
        with afcache.using(pipe, tolerance=[0.1]), pytest.raises(ValueError, match="which is 2, got 1"):
            draw(pipe, **PAIR, **options)
    assert refreshes(draw(pipe, **PAIR, **options)[1]) > 0
