"""The command line as a user meets it."""

import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import afcache
from afcache.cli.info import collect_info
from afcache.cli.jobs import make_jobs
from afcache.cli.main import main

SHORT = ["generate", "--no-compile", "--steps", "8"]


def fail(capsys, *arguments: str) -> str:
    """Run a command that must fail with one line on stderr; return that line."""
    try:
        status = main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    output = capsys.readouterr()
    assert status == 2
    lines = output.err.strip().splitlines()
    assert len(lines) == 1, output.err
    assert lines[0].startswith("afcache: error: ")
    return lines[0]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: command"),
        (["paint"], "invalid choice: 'paint'"),
        (["generate", "--stepz", "3"], "unrecognized arguments: --stepz"),
        (["generate", "--steps", "0"], "argument --steps: must be a whole number >= 1, got '0'"),
        (["generate", "--steps", "many"], "must be a whole number >= 1, got 'many'"),
        (["generate", "--seed", "-1"], "argument --seed: must be a whole number from 0"),
        (["generate", "--preset", "best"], "invalid choice: 'best'"),
        (["generate", "--preset", "fast", "--tolerance", "0.1"], "not allowed with argument --preset"),
        (["generate", "--tolerance", "-1"], "tolerance must be finite and >= 0, got -1.0"),
        (["generate", "--tolerance", "nan"], "tolerance must be finite and >= 0, got nan"),
        (["generate", "--model", "/no/such/folder", "--prompt", "x"], "--model '/no/such/folder': no such folder"),
        (["generate", "--model", "missing", "--prompt", "x"], "--model 'missing': no such folder"),
        (["generate", "--model", "here"], "--prompt is needed with --model"),
        (["generate", "--compare", "--no-cache"], "--compare needs the cache"),
        (["generate", "--true-cfg-scale", "0.5"], "--true-cfg-scale must be finite and >= 1"),
        (["generate", "--true-cfg-scale", "inf"], "--true-cfg-scale must be finite and >= 1"),
        (["generate", "--negative-prompt", "x", "--true-cfg-scale", "1"], "--negative-prompt has no effect without guidance"),
        (["generate", "--steps", "100000"], "argument --steps: must be at most 1000"),
        (["generate", "--height", "4000000"], "argument --height: must be at most 8192 pixels"),
        (["generate", "--device", "meta"], "--device 'meta' is not supported; use cpu or cuda"),
        (["generate", "--device", "cpu:7"], "--device 'cpu:7' is not here"),
        (["generate", "--device", "abacus"], "--device 'abacus' is not a device"),
        (["generate", "--device", "cuda:99"], "--device 'cuda:99' is not here"),
        ([*SHORT, "--height", "33"], "--height must be a multiple of 4 for this model, got 33"),
        (["generate", "--steps=--"], "argument --steps: expected one argument, got '--'"),
        (["generate", "one\nline"], "unrecognized arguments: one line"),
        (["generate", "--guidance-scale", "nan"], "--guidance-scale must be finite and >= 0, got nan"),
        (["generate", "--max-sequence-length", "5000"], "argument --max-sequence-length: must be at most 4096"),
        ([*SHORT, "--max-sequence-length", "513"], "`max_sequence_length` cannot be greater than 512 but is 513"),
        ([*SHORT, "--num-frames", "9"], "--num-frames: a FluxPipeline takes no such option; it takes --steps, --height, --wid"),
        ([*SHORT, "--fps", "9"], "--fps: a FluxPipeline takes no such option; it takes --steps, --height, --width, --true-cfg"),
        (["generate", "--num-frames", "0"], "argument --num-frames: must be a whole number >= 1, got '0'"),
        (["generate", "--fps", "1000"], "argument --fps: must be at most 100, got '1000'"),
        (["generate", "--num-images", "1000000"], "argument --num-images: must be at most 100000"),
        (["generate", "--config", "missing.json"], "--config 'missing.json' must be a file of settings: No such file"),
        (["generate", "--no-compile", "--output", __file__], "must be a folder or a place for one: File exists"),
        ([*SHORT, "--guidance-scale", "3"], "--guidance-scale: this model has no guidance embedding"),
    ],
)
def test_wrong_options_give_one_clear_line(capsys, tmp_path, monkeypatch, arguments: list[str], message: str):
    monkeypatch.chdir(tmp_path)
    assert message in fail(capsys, *arguments)


def test_a_folder_without_a_pipeline_is_refused(capsys, tmp_path):
    assert "has no model_index.json" in fail(capsys, "generate", "--model", str(tmp_path), "--prompt", "x")


def test_an_unexpected_failure_is_one_line_with_the_way_to_its_traceback(capsys, monkeypatch, tmp_path):
    def explode(*_: object) -> None:
        raise RuntimeError("C++ compile error\nmany lines")

    monkeypatch.setattr("afcache.cli.generate.run", explode)
    line = fail(capsys, "generate", "--output", str(tmp_path))
    assert "RuntimeError: C++ compile error (Is the compiler broken? --no-compile does without" in line
    monkeypatch.setenv("AFCACHE_DEBUG", "1")
    with pytest.raises(RuntimeError, match="many lines"):
        main(["generate"])


def test_prompts_that_look_alike_do_not_overwrite_each_other(tmp_path):
    arguments = ["--prompt", "a two!", "--prompt", "A two?", "--no-cache", "--output", str(tmp_path)]
    assert main(["generate", "--steps", "2", *arguments]) == 0
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_a_compiler_behind_a_launcher_is_found(monkeypatch):
    import torch

    from afcache.cli.device import missing_compiler

    monkeypatch.setenv("CXX", f"{sys.executable} -m nothing")
    assert missing_compiler(torch.device("cpu")) is None


def test_a_missing_compiler_names_the_way_out(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    line = fail(capsys, "generate", "--device", "cpu", "--output", str(tmp_path))
    assert "no C++ compiler: 'no-such-compiler' is not on the PATH" in line
    assert "--no-compile" in line


def test_an_unreachable_hub_is_one_line(capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError("cannot reach the hub\nand a long story")

    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", refuse)
    line = fail(capsys, "generate", "--no-compile", "--model", "someone/some-model", "--prompt", "x")
    assert "could not be loaded from the Hugging Face hub: cannot reach the hub" in line


def test_generate_writes_pictures_reports_and_plots(capsys, tmp_path):
    arguments = ["--prompt", "a handwritten two on a palace", "--num-images", "2", "--seed", "4", "--output", str(tmp_path)]
    assert main([*SHORT, *arguments]) == 0
    stems = [f"a_handwritten_two_on_a_palace_seed{seed}" for seed in (4, 5)]
    for stem in stems:
        picture = pixels(tmp_path / f"{stem}.png")
        assert picture.shape == (32, 32, 3)
        assert picture.std() > 5
        report = json.loads((tmp_path / f"{stem}.json").read_text())
        assert report["num_steps"] == len(report["pattern"]) == 8
        assert pixels(tmp_path / f"{stem}_report.png").shape[1] > 500
    lines = capsys.readouterr().out.splitlines()
    for line, stem in zip(lines, stems, strict=False):
        assert line.startswith(f"{stem}.png in ")
        assert json.loads((tmp_path / f"{stem}.json").read_text())["pattern"] in line
    reports = [json.loads((tmp_path / f"{stem}.json").read_text()) for stem in stems]
    ran, whole = (sum(report[name] for report in reports) for name in ("block_evaluations", "block_evaluations_uncached"))
    assert lines[2].startswith(f"2 images: {ran} of {whole} block evaluations ran, {whole / ran:.2f}x fewer (")
    assert lines[4:] == [f"written to {tmp_path}/"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a cat", "a cat!"),
        ("a cat", "A cat"),
        ("/", "?"),
        ("x" * 40 + " one", "x" * 40 + " two"),
        ("a cat", "a_cat"),
        (" a", "a"),
    ],
)
def test_files_of_two_prompts_never_share_a_name(first: str, second: str):
    stems = [make_jobs(Namespace(prompt=[prompt], num_images=1, seed=0))[0].stem for prompt in (first, second)]
    assert stems[0] != stems[1]
    assert all(re.fullmatch(r"\w+_seed0", stem) for stem in stems)


def test_a_prompt_of_several_lines_is_one_line_of_a_table():
    job = make_jobs(Namespace(prompt=["a cat\n on\ta mat, " + "very " * 20], num_images=1, seed=3))[0]
    assert job.label == "a cat on a mat, very very very ver #3"
    assert job.line == ("a cat on a mat, " + "very " * 20).strip()


def test_the_same_prompt_twice_is_two_files_and_a_plain_one_names_them():
    jobs = make_jobs(Namespace(prompt=["a cat", "a cat"], num_images=2, seed=3))
    assert [job.stem for job in jobs] == ["a_cat_seed3", "a_cat_seed4", "a_cat_seed3_2", "a_cat_seed4_3"]


@pytest.mark.parametrize(("model", "words"), [(None, "on a"), ("mini-flux", "on a"), ("mini-wan", "moves")])
def test_models_that_are_built_in_have_prompts(model: str | None, words: str):
    jobs = make_jobs(Namespace(prompt=None, model=model, num_images=2, seed=3))
    assert all(words in job.prompt for job in jobs)
    assert len({job.stem for job in jobs}) == len(jobs) >= 6


def test_nothing_of_an_earlier_run_stays_under_a_name(tmp_path):
    stale = tmp_path / "a_two_seed0_uncached.png"
    others = tmp_path / "a_two_seed1_uncached.png", tmp_path / "mine.png"
    for path in (stale, *others):
        path.write_text("old")
    assert main(["generate", "--no-compile", "--steps", "2", "--prompt", "a two", "--output", str(tmp_path)]) == 0
    assert not stale.exists()
    assert all(path.read_text() == "old" for path in others)


def test_the_report_of_a_single_image_is_printed_whole(capsys, tmp_path):
    assert main([*SHORT, "--prompt", "a handwritten two on a palace", "--output", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "  blocks     " in output
    assert "  estimate   " in output
    assert "images:" not in output


def test_another_policy_is_used_reported_and_excludes_the_presets(capsys, tmp_path):
    arguments = ["--prompt", "a two", "--policy", "layerwise", "--output", str(tmp_path)]
    assert main([*SHORT, *arguments]) == 0
    assert "groups     F computed, t Taylor" in capsys.readouterr().out
    report = json.loads((tmp_path / "a_two_seed0.json").read_text())
    assert len(report["steps"][0]["groups"]) == 4
    with pytest.raises(SystemExit):
        main([*SHORT, *arguments, "--preset", "fast"])
    assert "--preset: not allowed with argument --policy" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*SHORT, "--policy", "teacash"])
    assert "invalid choice: 'teacash' (choose from" in capsys.readouterr().err


def test_generate_draws_each_image_once(monkeypatch, tmp_path):
    from afcache.cli.drawing import Draw

    drawn = []
    original = Draw.__call__
    monkeypatch.setattr(Draw, "__call__", lambda self, job: drawn.append(job.seed) or original(self, job))
    arguments = ["--prompt", "a two", "--num-images", "2", "--output", str(tmp_path)]
    assert main(["generate", "--no-compile", "--steps", "2", *arguments]) == 0
    assert drawn == [0, 1]


def test_generate_draws_what_the_pipeline_draws(tmp_path):
    import torch

    arguments = ["--prompt", "a handwritten two on a palace", "--seed", "4", "--no-cache", "--output", str(tmp_path)]
    assert main([*SHORT, *arguments]) == 0
    pipe: Any = afcache.load_mini_flux()
    expected = pipe(
        "a handwritten two on a palace",
        num_inference_steps=8,
        max_sequence_length=16,
        true_cfg_scale=2.0,
        negative_prompt="",
        generator=torch.Generator().manual_seed(4),
    ).images[0]
    drawn = pixels(tmp_path / "a_handwritten_two_on_a_palace_seed4.png")
    assert afcache.psnr(drawn, np.asarray(expected)) > 50


def test_compare_prints_the_gain_and_writes_one_picture(capsys, tmp_path):
    arguments = ["--compare", "--prompt", "a handwritten two on a palace", "--true-cfg-scale", "2", "--output", str(tmp_path)]
    assert main(["generate", "--no-compile", "--steps", "12", *arguments]) == 0
    output = capsys.readouterr().out
    for word in ("block evaluations", "dB", "SSIM", "(nothing compiled)"):
        assert word in output
    # A third fewer evaluations; what the clock says of that depends on what else the machine does.
    assert re.search(r"wall clock +\d+\.\d\dx (faster|slower): ", output)
    assert pixels(tmp_path / "compare.png").shape[1] > 600
    assert (tmp_path / "a_handwritten_two_on_a_palace_seed0_uncached.png").is_file()


def test_info_names_versions_and_what_can_be_used(capsys):
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    for word in ("afcache", "torch", "diffusers", "device", "compiler", "several GPUs"):
        assert word in output
    assert collect_info()["afcache"] == afcache.__version__


def test_info_blames_nobody_for_a_machine_without_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    said = collect_info()["several GPUs"]
    assert said.startswith("none on this machine, nothing is missing")
    assert "triton" not in said


def test_info_says_why_xfuser_cannot_be_used_where_there_are_gpus(monkeypatch):
    for name, value in (("is_available", True), ("device_count", 2), ("get_device_name", "a card")):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    monkeypatch.setitem(sys.modules, "xfuser", None)
    info = collect_info()
    assert info["device"] == "cuda (a card, 2 in all)"
    assert info["several GPUs"].startswith("xfuser cannot be imported: import of xfuser halted")
    monkeypatch.setitem(sys.modules, "xfuser", object())
    assert collect_info()["several GPUs"] == "yes, 2 through xfuser"


@pytest.mark.parametrize("command", [["-m", "afcache"]])
def test_module_runs_as_a_command(command: list[str]):
    result = subprocess.run([sys.executable, *command, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"afcache {afcache.__version__}"


def test_installed_script_prints_its_version():
    script = Path(sys.executable).parent / "afcache"
    result = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"afcache {afcache.__version__}"
