"""The picture of one image, step by step."""

import json
from pathlib import Path

import pytest

import afcache
from bench import draw_step
from bench.mini_flux import sampling
from bench.record.naming import result_path


@pytest.mark.host
def test_the_picture_tells_what_the_policy_saw_and_what_was_true(tmp_path: Path):
    draw_step.main(tmp_path, steps=12)
    stored = json.loads(result_path(draw_step.SUBJECT, ".json", folder=tmp_path).read_text())
    assert result_path(draw_step.SUBJECT, ".png", folder=tmp_path).stat().st_size > 20_000
    # Of so few steps each may add more.
    rows, tolerance = stored["rows"], afcache.PRESETS["balanced"].tolerance * 16 / 12
    pattern = "".join("F" if row["computed because of"] else "." for row in rows)
    assert any(pattern in note for note in stored["notes"])
    assert pattern.startswith("FF")
    assert "." in pattern
    for row in rows:
        estimate = row["estimate since the last refresh"]
        assert (estimate >= tolerance) == (row["computed because of"] == "tolerance")
    # Known again: what the pipeline draws without the latents being kept.
    pipe = sampling.load()
    truth = sampling.draw(pipe, draw_step.SEED, steps=12, output_type="latent")
    afcache.compile_pipeline(pipe, compile=False)
    latents = sampling.draw(pipe, draw_step.SEED, steps=12, output_type="latent")
    distance = ((latents - truth) ** 2).sum() ** 0.5 / (truth**2).sum() ** 0.5
    assert rows[-1]["distance of the latents after it"] == pytest.approx(distance, rel=1e-3)


@pytest.mark.host
def test_the_true_error_of_an_exact_step_is_none():
    pipe = sampling.load()
    problem = sampling.prepare(pipe, [draw_step.SEED], steps=6)
    exact = draw_step.walk(pipe, afcache.CacheConfig(policy="none"), problem)
    assert draw_step.true_error(pipe, problem, exact.latents, 3) < 1e-4
    moved = [*exact.latents[:4], exact.latents[3], *exact.latents[5:]]
    assert draw_step.true_error(pipe, problem, moved, 3) == pytest.approx(1.0)
