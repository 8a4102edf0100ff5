"""Models that are damaged, incomplete or out of reach: one line that says what, and nothing drawn."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import afcache
from afcache.assets import recommended_settings
from tests.cli.test_cli import fail


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of mini-FLUX."""
    return shutil.copytree(afcache.mini_flux_folder(), tmp_path / "model")


def say(capsys: Any, model: Path | str, *options: str) -> str:
    output = ["--output", str(Path(model).parent / "out")] if isinstance(model, Path) else []
    return fail(capsys, "generate", "--no-compile", "--steps", "2", "--prompt", "x", "--model", str(model), *output, *options)


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "recommended.json is no JSON file of recommended settings: Expecting property name"),
        (
            "[]",
            "recommended.json must be an object of height, width, num_frames, max_sequence_length, num_inference_steps, true_c",
        ),
        ('{"height": "x"}', "recommended.json: height must be a whole number >= 1, got 'x'. Mend the file, or remove it"),
        ('{"width": -4}', "recommended.json: width must be a whole number >= 1, got -4."),
        ('{"max_sequence_length": 2.5}', "recommended.json: max_sequence_length must be a whole number >= 1, got 2.5."),
        ('{"true_cfg_scale": Infinity}', "recommended.json: true_cfg_scale must be a finite number >= 1, got inf."),
        ('{"height": 33}', "height in recommended.json must be a multiple of 4 for this model, got 33"),
    ],
)
def test_bad_recommended_settings_are_blamed_on_their_file(capsys, model: Path, text: str, message: str):
    (model / "recommended.json").write_text(text)
    assert message in say(capsys, model)


def test_a_negative_prompt_that_guides_nothing_is_refused(capsys, model: Path):
    (model / "recommended.json").unlink()
    assert "--negative-prompt has no effect without guidance; give --true-cfg" in say(capsys, model, "--negative-prompt", "x")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "model_index.json must be an object whose _class_name names a pipeline of diffusers, got []. Download"),
        ("{}", "model_index.json must be an object whose _class_name names a pipeline of diffusers, got {}"),
        ("{", "model_index.json cannot be read: Expecting property name"),
        ('{"_class_name": "OdePipeline"}', "is a OdePipeline, which is no pipeline of diffusers 0."),
        ('{"_class_name": "FluxTransformer2DModel"}', "is a FluxTransformer2DModel, which is no pipeline of diffusers 0."),
        (
            '{"_class_name": "StableDiffusionPipeline"}',
            "is a StableDiffusionPipeline without a transformer: what is cached are",
        ),
        (
            '{"_class_name": "FluxFillPipeline"}',
            "is a FluxFillPipeline, which needs image; the command draws from text alone. In P",
        ),
        (
            '{"_class_name": "StableAudioPipeline"}',
            "is a StableAudioPipeline, which draws neither pictures nor videos from text",
        ),
        (
            '{"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderOde"]}',
            "model_index.json names diffusers.AutoencoderOde as vae, which is not in the version that is installed",
        ),
    ],
)
def test_a_pipeline_that_the_command_cannot_draw_with_is_refused(capsys, tmp_path: Path, index: str, message: str):
    (tmp_path / "model_index.json").write_text(index)
    assert message in say(capsys, tmp_path)


def test_a_modular_pipeline_is_refused(capsys, tmp_path: Path):
    (tmp_path / "modular_model_index.json").write_text("{}")
    assert "is a modular pipeline, which the command does not draw with. In Python, compile_pip" in say(capsys, tmp_path)


def test_recommended_settings_that_are_not_known_are_left_out(tmp_path: Path):
    (tmp_path / "recommended.json").write_text('{"height": 64, "steps": "many"}')
    assert recommended_settings(tmp_path) == {"height": 64}


@pytest.mark.parametrize(
    ("part", "entries", "message"),
    [
        ("transformer", {"num_layers": 5}, "the weights beside it disagree: 32 weights are missing and 0 are unknown (transf"),
        ("transformer", {"num_single_layers": 2}, "disagree: 0 weights are missing and 84 are unknown (single_transformer_"),
        ("transformer", {"num_layers": "many"}, "transformer/config.json makes no FluxTransformer2DModel: 'str' object cannot"),
        ("transformer", {"joint_attention_dim": 7}, "transformer could not be loaded: Cannot load because context_embedder"),
        ("vae", {"layers_per_block": 2}, "vae/config.json and the weights beside it disagree: 32 weights are missing and 0"),
        ("text_encoder_2", {"num_layers": 9}, "text_encoder_2/config.json and the weights beside it disagree: "),
    ],
)
def test_a_config_and_weights_that_disagree_are_refused(capsys, model: Path, part: str, entries: dict[str, Any], message: str):
    """Diffusers would draw with random weights, or without some."""
    change(model / part / "config.json", **entries)
    assert message in say(capsys, model)


def test_a_damaged_scheduler_is_one_line(capsys, model: Path):
    (model / "scheduler" / "scheduler_config.json").write_text("{")
    assert "scheduler could not be loaded: It looks like the config file" in say(capsys, model)


def test_damaged_weights_are_one_line(capsys, model: Path):
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "transformer could not be loaded: Unable to load weights" in say(capsys, model)


@pytest.mark.parametrize(
    ("part", "text", "message"),
    [
        ("vae", "{}", "vae/config.json must be an object with block_out_channels, got {}. Download the model again"),
        ("vae", "[]", "vae/config.json must be an object with block_out_channels, got []"),
        ("transformer", "{}", "transformer/config.json must be an object with _class_name, got {}. Download the model again"),
    ],
)
def test_a_config_without_what_is_needed_is_refused(capsys, model: Path, part: str, text: str, message: str):
    (model / part / "config.json").write_text(text)
    assert message in say(capsys, model)


def test_a_hub_id_without_a_connection_is_said_to_be_out_of_reach(capsys, monkeypatch):
    """Diffusers says that the model has no such file, after five attempts that it warns of."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = say(capsys, "someone/no-such-model")
    assert "--model 'someone/no-such-model' is a hub id, and the Hugging Face hub cannot be reached; nor is the model" in line
    assert line.endswith("Go online, or give the folder of a pipeline that was downloaded.")
