"""Pipelines of real sizes: as many weights as their models have, and a small one measured from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
from torch._subclasses import FakeTensorMode

from bench.models.real_pipelines import REAL_PIPELINES
from bench.real_models import forced
from bench.record.naming import result_path

ROOT = Path(__file__).parent.parent.parent
# Billions, as their makers say.
WEIGHTS = {"flux1": 11.9, "flux2": 32.2, "qwen_image": 20.4, "wan21_1_3b": 1.42, "z_image": 6.15}


@pytest.mark.parametrize("name", REAL_PIPELINES)
def test_models_have_their_real_size(name: str):
    model = REAL_PIPELINES[name]
    with FakeTensorMode():
        transformer = getattr(diffusers, model.transformer)(**model.settings)
    count = sum(parameter.numel() for parameter in transformer.parameters())
    assert count / 1e9 == pytest.approx(WEIGHTS[name], rel=0.01)
    assert len(getattr(transformer, model.blocks)) >= 30


def test_refreshes_are_those_of_a_fixed_interval_after_two_steps():
    assert forced(12, 4) == "FF...F...F.."
    assert forced(6, 2) == "FF.F.F"


@pytest.mark.host
def test_a_small_model_is_measured_under_every_cache(tmp_path: Path):
    arguments = ["qwen_image", "--small", "--device", "cpu", "--backend", "aot_eager", "--steps", "8", "--rounds", "1"]
    command = [sys.executable, "-W", "ignore", "-m", "bench.real_models", *arguments, "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    written = json.loads(result_path("real_models_qwen_image_small", ".json", folder=tmp_path).read_text())
    plain, ours, *_, last = rows = written["rows"]
    assert not [row["note"] for row in rows if row["note"]]
    assert (plain["pattern"], plain["speed-up"]) == ("F" * 8, 1.0)
    assert ours["contender"] == "AFCache, eager"
    assert ours["pattern"] == last["pattern"] == forced(8, 4)
    assert last["contender"].startswith("cache-dit")
    # Two calls of the model a step, both in its seconds, and none of its blocks at a cached one.
    assert 0 < ours["of a refresh (%)"] < 50
    assert "AFCache at tolerance 0, blocks compiled 0" in written["notes"][-1]


@pytest.mark.host
def test_without_a_gpu_it_says_how_to_try_it():
    command = [sys.executable, "-W", "ignore", "-m", "bench.real_models", "flux2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env={"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 2
    assert "--device cpu --small" in result.stderr
