"""A target instead of a knob: the search by itself, on mini-FLUX, and on the command line."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

import afcache
from afcache.calibration.tolerance import LARGEST, SMALLEST, choose, search
from afcache.cli.main import main
from afcache.settings.config import CacheConfig, Layerwise
from afcache.settings.curve import Calibration, CurvePoint
from afcache.settings.presets import for_videos, tuned
from bench.mini_flux import sampling

PROMPTS = [sampling.prompt_of(seed) for seed in range(4)]
FAST: dict[str, Any] = {**sampling.SETTINGS, "num_inference_steps": 12, "progress": False}


def smooth(tolerance: float) -> CurvePoint:
    """A model whose curve is known: 2x at 1/64, four times the tolerance is one more; 6 dB for each factor of two."""
    level = math.log2(tolerance * 64)
    return CurvePoint(tolerance=tolerance, speedup=2 + level / 2, psnr=48 - 6 * level, worst_psnr=30 - 6 * level)


def stairs(tolerance: float) -> CurvePoint:
    """Decisions are discrete: speed and quality jump."""
    point = smooth(tolerance)
    return dataclasses.replace(point, speedup=float(math.floor(point.speedup)), psnr=6.0 * math.floor(point.psnr / 6))


@pytest.mark.parametrize("curve", [smooth, stairs])
@pytest.mark.parametrize(
    ("target", "goal"), [("target_speedup", g) for g in (1.5, 2.0, 2.1, 4.9)] + [("target_psnr", g) for g in (36.1, 48.0, 70.0)]
)
def test_the_search_finds_the_best_point_that_meets_a_target(curve, target: str, goal: float):
    points = search(curve, **{target: goal})
    best = choose(points, **{target: goal})
    assert len(points) <= 12
    assert [point.tolerance for point in points] == sorted({point.tolerance for point in points})
    if target == "target_speedup":
        assert best.speedup >= goal
        worse = curve(best.tolerance * 0.94)
        assert worse.speedup < goal or best.speedup <= goal * 1.01 or worse.psnr == best.psnr
    else:
        assert best.psnr >= goal
        bolder = curve(best.tolerance * 1.06)
        assert bolder.psnr < goal or best.psnr <= goal * 1.01 or bolder.speedup == best.speedup


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"target_speedup": 9.0}, r"target_speedup=9 is not reached: 6\.00x fewer block evaluations at most, at 0\.0 dB"),
        ({"target_psnr": 140.0}, r"target_psnr=140 is not reached: 96\.0 dB at most, at -2\.00x and tolerance 6\.104e-05"),
    ],
)
def test_a_target_out_of_reach_says_what_is_within(target: dict[str, float], said: str):
    points = search(smooth, **target)
    assert {points[0].tolerance, points[-1].tolerance} & {SMALLEST, LARGEST}
    with pytest.raises(ValueError, match=said):
        choose(points, **target)


@pytest.mark.parametrize("target", [{"target_speedup": 1.8}, {"target_psnr": 40.0}])
def test_a_calibrated_config_meets_its_target_and_draws_what_was_measured(target: dict[str, float]):
    pipe = sampling.load()
    config = afcache.calibrate(pipe, PROMPTS, **target, **FAST)
    assert config.calibration is not None
    chosen = next(point for point in config.calibration.curve if point.tolerance == config.tolerance)
    assert chosen.speedup >= target.get("target_speedup", 1.0)
    assert chosen.psnr >= target.get("target_psnr", 0.0)
    assert dataclasses.replace(config, calibration=None) == tuned(config.tolerance)
    # The pipeline is as it was, and the setting gives again what was measured.
    with pytest.raises(ValueError, match="was not passed to"):
        afcache.report(pipe)
    ran = uncached = 0
    afcache.compile_pipeline(pipe, config, compile=False)
    for seed in range(len(PROMPTS)):
        sampling.draw(pipe, seed, steps=12)
        ran += afcache.report(pipe).block_evaluations
        uncached += afcache.report(pipe).block_evaluations_uncached
    assert uncached / ran == pytest.approx(chosen.speedup)


def test_what_is_searched_for_videos_are_their_settings():
    pipe = afcache.load_mini_wan()
    few: dict[str, Any] = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 12, "progress": False}
    config = afcache.calibrate(pipe, ["the digit 3 moves up over a palace"], target_speedup=1.2, **few)
    assert dataclasses.replace(config, calibration=None) == for_videos(tuned(config.tolerance))


def test_other_adaptive_settings_can_be_searched_and_a_failure_leaves_the_pipeline_uncached(monkeypatch):
    pipe = sampling.load()
    base = CacheConfig(order=0, warmup_steps=3)
    config = afcache.calibrate(pipe, PROMPTS[:2], target_psnr=25, config=base, **FAST)
    assert dataclasses.replace(config, tolerance=base.tolerance) == base
    monkeypatch.setattr("afcache.calibration.tolerance.psnr", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        afcache.calibrate(pipe, PROMPTS[:2], target_psnr=25, **FAST)
    with pytest.raises(ValueError, match="was not passed to"):
        afcache.report(pipe)


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"target_psnr": None}, ValueError, "exactly one of target_speedup and target_psnr must be given, got None and None"),
        ({"target_speedup": 2}, ValueError, "exactly one of target_speedup and target_psnr must be given, got 2 and 40"),
        ({"target_psnr": math.nan}, ValueError, "target_psnr must be finite and between 0 and 150, got nan"),
        ({"target_psnr": "40"}, TypeError, "target_psnr must be a number, got '40'"),
        ({"target_psnr": None, "target_speedup": 0.5}, ValueError, "target_speedup must be finite and >= 1, got 0.5"),
        ({"prompts": "a cat"}, ValueError, "prompts must be a list of at least one prompt, got 'a cat'"),
        ({"prompts": []}, ValueError, "prompts must be a list"),
        ({"prompts": iter(PROMPTS)}, ValueError, "prompts must be a list"),
        ({"prompts": 3}, ValueError, "prompts must be a list"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be between 1 and"),
        ({"generator": 1, "prompt": "x"}, ValueError, "prompt, generator cannot be given to calibrate"),
        ({"config": CacheConfig(policy="fixed")}, ValueError, "config must have policy 'adaptive'.* got 'fixed'"),
        ({"config": 3}, TypeError, "config must be an afcache.CacheConfig, got int"),
        ({"seed": -1}, ValueError, "seed must be between 0 and"),
        ({"progress": 1}, TypeError, "progress must be True or False, got 1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_drawn(changes: dict[str, Any], kind: type[Exception], said: str):
    class Unused:
        transformer = None

    with pytest.raises(kind, match=said):
        afcache.calibrate(Unused(), **{"prompts": PROMPTS, "target_psnr": 40, **changes})


def test_a_cached_pipeline_is_refused():
    pipe = afcache.compile_pipeline(sampling.load(), compile=False)
    with pytest.raises(ValueError, match="pipe is cached already"):
        afcache.calibrate(pipe, PROMPTS, target_psnr=40)


@pytest.mark.parametrize(
    "config",
    [
        CacheConfig(max_growth=math.inf, refresh_steps=(3, 5), max_cached_steps=4),
        CacheConfig(layerwise=Layerwise(groups=2, stability_bounds=(0.9, 0.8, 0.7))),
        dataclasses.replace(
            tuned(0.02),
            calibration=Calibration(target_speedup=None, target_psnr=40.0, images=3, curve=(smooth(0.1), smooth(0.2))),
        ),
    ],
)
def test_settings_are_read_as_they_were_written(config: CacheConfig, tmp_path: Path):
    config.to_json(tmp_path / "settings.json")
    read = CacheConfig.from_json(tmp_path / "settings.json")
    assert (read, read.calibration) == (config, config.calibration)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("{", ValueError, "settings.json is no JSON file of settings"),
        ("[]", ValueError, "settings.json must be an object of CacheConfig's fields, got list"),
        ('{"tolerence": 1}', ValueError, r"must be an object of CacheConfig's fields, got \['tolerence'\]"),
        ('{"tolerance": "much"}', TypeError, "tolerance must be a number, got 'much'"),
        ('{"calibration": {"images": 3}}', ValueError, "calibration must be what afcache.calibrate measured"),
        ('{"calibration": 3}', ValueError, "calibration must be what afcache.calibrate measured, got 3"),
        ('{"layerwise": {"group": 3}}', ValueError, r"layerwise must be an object of Layerwise's fields, got \['group'\]"),
    ],
)
def test_files_that_hold_no_settings_are_refused(text: str, kind: type[Exception], said: str, tmp_path: Path, capsys):
    path = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(kind, match=said):
        CacheConfig.from_json(path)
    assert main(["generate", "--config", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_line_calibrates_and_draws_with_the_result(tmp_path: Path, capsys):
    path = tmp_path / "mine.json"
    small = ["--steps", "12", "--prompt", "a handwritten seven on a flower"]
    assert main(["calibrate", "--target-speedup", "1.5", "--num-images", "2", "--output", str(path), *small]) == 0
    said = capsys.readouterr().out
    assert "2 images at every tolerance, 12 steps" in said
    assert f"afcache generate --config {path}" in said
    assert json.loads(path.read_text())["calibration"]["target_speedup"] == 1.5
    drawn = tmp_path / "drawn"
    assert main(["generate", "--no-compile", "--config", str(path), "--output", str(drawn), *small]) == 0
    used = json.loads(next(drawn.glob("*.json")).read_text())["config"]
    assert used["tolerance"] == CacheConfig.from_json(path).tolerance


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one of the arguments --target-speedup --target-psnr is required"),
        (["--target-psnr", "nan"], "target_psnr must be finite"),
        (["--target-psnr", "40", "--target-speedup", "2"], "not allowed with argument"),
        (["--target-psnr", "40", "--output", "/no/such/folder/x.json"], "--output must be a file in a folder that exists"),
        (["--target-psnr", "40", "--model", "m"], "--prompt is needed with --model"),
    ],
)
def test_bad_options_of_the_command_are_one_line(arguments: list[str], said: str, capsys):
    try:
        status = main(["calibrate", *arguments])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1)
    assert said in error
