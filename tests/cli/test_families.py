"""The command line with pipelines of other families: tiny ones of the zoo, with text encoders, and mini-Wan."""

import json
import re
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import afcache
from afcache.cli.main import main
from bench.mini_wan.parts import EXPERTS
from tests.cli.test_cli import fail, pixels
from tests.support.prompted import PROMPTED, SIZES

WAN = str(afcache.mini_wan_folder())
PROMPT = "a handwritten two on a palace"
STEM = "a_handwritten_two_on_a_palace_seed0"
SHORT = ["--no-compile", "--prompt", PROMPT]
FEW = ["--num-frames", "5", "--steps", "4"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every pipeline that draws from a prompt, saved."""
    home = tmp_path_factory.mktemp("models")
    for name, make in PROMPTED.items():
        make().save_pretrained(home / name)
    return {name: home / name for name in PROMPTED}


def generate(model: Path | str, output: Path, *options: str) -> None:
    assert main(["generate", "--model", str(model), *SHORT, "--output", str(output), *options]) == 0


def frames_of(path: Path) -> int:
    with Image.open(path) as film:
        return film.n_frames  # pyright: ignore[reportAttributeAccessIssue]


def as_option(words: tuple[str, ...]) -> dict[str, int]:
    """Options of the command line as arguments of a call."""
    return {name[2:].replace("-", "_"): int(value) for name, value in zip(words[::2], words[1::2], strict=True)}


@pytest.mark.host
@pytest.mark.parametrize("name", PROMPTED)
def test_the_command_draws_what_the_pipeline_draws(folders, tmp_path, name: str):
    """All of two steps is computed; what is drawn depends on the prompt."""
    generate(folders[name], tmp_path, "--steps", "2", *SIZES[name])
    pipe: Any = PROMPTED[name]()
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "np", **as_option(SIZES[name])}
    expected, other = (
        np.asarray(pipe(prompt=prompt, generator=torch.Generator().manual_seed(0), **options)[0][0])
        for prompt in (PROMPT, "an owl")
    )
    assert np.abs(expected - other).max() > 0.01
    if expected.ndim == 4:
        assert frames_of(tmp_path / f"{STEM}.gif") == len(expected)
        drawn, width = pixels(tmp_path / f"{STEM}_frames.png"), expected.shape[2]
        assert np.abs(drawn[:, -width:] - expected[-1] * 255).max() < 1
        drawn, expected = drawn[:, :width], expected[0]
    else:
        drawn = pixels(tmp_path / f"{STEM}.png")
    assert np.abs(drawn - expected * 255).max() < 1
    report = json.loads((tmp_path / f"{STEM}.json").read_text())
    assert report["pattern"] == "FF"
    assert pixels(tmp_path / f"{STEM}_report.png").shape[1] > 500


@pytest.mark.host
def test_sound_is_written_beside_the_video(folders, tmp_path):
    generate(folders["LTX2Pipeline"], tmp_path, "--steps", "2", *SIZES["LTX2Pipeline"])
    with wave.open(str(tmp_path / f"{STEM}.wav")) as sound:
        assert (sound.getnchannels(), sound.getsampwidth(), sound.getframerate()) == (2, 2, 24000)
        samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2")
    assert samples.std() > 10


@pytest.mark.host
def test_a_scale_that_guides_only_with_a_negative_prompt_is_given_one(folders, tmp_path, capsys):
    generate(folders["QwenImagePipeline"], tmp_path, "--steps", "2", "--true-cfg-scale", "3", *SIZES["QwenImagePipeline"])
    # Two steps, two branches, two blocks.
    assert "blocks     8 of 8 evaluations ran" in capsys.readouterr().out


@pytest.mark.host
def test_a_video_is_compared_frame_by_frame(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("afcache.cli.comparison._ROUNDS", 1)
    arguments = ["--compare", "--num-frames", "5", "--steps", "12", "--tolerance", "0.02"]
    arguments += ["--prompt", "the digit 3 moves up over a palace"]
    generate(WAN, tmp_path, *arguments)
    output = capsys.readouterr().out
    assert "against the uncached videos" in output
    assert "settings           tolerance 0.02, warmup 3 steps" in output
    assert re.search(r"SSIM +worst frame +flicker\n.*F.* dB +[01]\.\d+ +\d+\.\d dB +\d+\.\d+\n", output)
    assert "flicker: what changes from frame to frame and should not" in output
    assert "no MP4 was written beside the GIF: that needs an encoder, pip install imageio-ffmpeg" in output
    assert f"side by side: {tmp_path}/compare.gif" in output
    assert frames_of(tmp_path / "compare.gif") == 5
    with Image.open(tmp_path / "compare.gif") as film:
        assert film.info["duration"] == 60
        # Two videos, of three panels each, with titles and gaps.
        assert film.size == (3 * 240 + 2 * 6, 2 * (240 + 16))
        first = np.asarray(film.convert("RGB")).astype(float)
    uncached, cached, difference = (first[16:256, left : left + 240] for left in (0, 246, 492))
    assert np.abs(uncached - cached).mean() < 5 < np.abs(uncached - difference).mean()
    for ending in ("", "_uncached"):
        assert pixels(tmp_path / f"{STEM}{ending}_frames.png").shape == (32, 5 * 32 + 4, 3)
    strips = pixels(tmp_path / "compare.png")
    assert strips.shape[1] > 1000
    assert json.loads((tmp_path / f"{STEM}.json").read_text())["num_steps"] == 12


@pytest.mark.host
def test_two_experts_are_drawn_with_and_reported_together(tmp_path):
    generate(EXPERTS, tmp_path, "--no-cache", *FEW)
    generate(EXPERTS, tmp_path / "cached", "--tolerance", "0", *FEW)
    drawn, expected = (pixels(path / f"{STEM}_frames.png").astype(int) for path in (tmp_path / "cached", tmp_path))
    assert np.abs(drawn - expected).max() <= 1
    assert json.loads((tmp_path / "cached" / f"{STEM}.json").read_text())["pattern"] == "FFFF"
    assert not (tmp_path / f"{STEM}.json").exists()


@pytest.mark.host
def test_a_video_is_written_as_mp4_where_that_can_be(tmp_path, monkeypatch, capsys):
    written: list[tuple[int, str, int]] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("diffusers.utils.export_to_video", lambda frames, path, fps: written.append((len(frames), path, fps)))
    generate(WAN, tmp_path, *FEW, "--fps", "8")
    assert written == [(5, f"{tmp_path}/{STEM}.mp4", 8)]
    assert "no MP4" not in capsys.readouterr().out
    with Image.open(tmp_path / f"{STEM}.gif") as film:
        assert film.info["duration"] == 120


@pytest.mark.host
def test_calibration_takes_videos(folders, tmp_path, capsys):
    arguments = ["--prompt", PROMPT, "--num-images", "1", "--steps", "8", *SIZES["LTXPipeline"]]
    path = tmp_path / "found.json"
    assert (
        main(
            ["calibrate", "--model", str(folders["LTXPipeline"]), "--target-speedup", "1.1", *arguments, "--output", str(path)]
        )
        == 0
    )
    assert "1 videos at every tolerance, 8 steps, against the uncached ones" in capsys.readouterr().out
    assert json.loads(path.read_text())["tolerance"] > 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("WanPipeline", ["--true-cfg-scale", "2"], "--true-cfg-scale: a WanPipeline takes no such option; it takes --steps,"),
        ("Flux2KleinPipeline", ["--negative-prompt", "x"], "--negative-prompt: a Flux2KleinPipeline takes no such option; it"),
        ("LTXPipeline", ["--height", "33"], "`height` and `width` have to be divisible by 32 but are 33 and"),
        ("StableDiffusion3Pipeline", ["--height", "34"], "--height must be a multiple of 4 for this model, got 34."),
        ("WanPipeline", ["--policy", "taylorseer"], "config has target='residual' (policy 'fixed'), which needs the inside of"),
        ("WanPipeline", ["--ulysses", "2"], "--ulysses: only FLUX.1 is drawn by several processes; start this model without"),
        ("QwenImagePipeline", ["--guidance-scale", "2"], "--guidance-scale: this model has no guidance embedding; use --true"),
    ],
)
def test_what_a_pipeline_does_not_take_is_one_line(folders, tmp_path, capsys, name: str, options: list[str], message: str):
    model = WAN if name == "WanPipeline" else str(folders[name])
    assert message in fail(capsys, "generate", "--model", model, *SHORT, "--output", str(tmp_path), *options)


def test_torchrun_is_refused_with_a_model_that_ranks_cannot_share(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = fail(capsys, "generate", "--model", WAN, *SHORT, "--output", str(tmp_path))
    assert "2 processes: only FLUX.1 is drawn by several processes; start this model without torchrun" in line
