"""mini-FLUX as it ships: sizes, dtypes, loading by plain diffusers, and what it draws."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

import afcache
from afcache.assets import recommended_settings

MIB = 2**20


def test_the_folder_is_small():
    size = sum(path.stat().st_size for path in afcache.mini_flux_folder().rglob("*") if path.is_file())
    assert MIB < size < 12 * MIB


def test_plain_diffusers_loads_it_in_float32():
    pipe = FluxPipeline.from_pretrained(afcache.mini_flux_folder())
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert getattr(pipe, name).dtype == torch.float32, name
    assert 2e6 < sum(p.numel() for p in pipe.transformer.parameters()) < 3e6
    assert len(pipe.transformer.transformer_blocks) == 4
    assert len(pipe.transformer.single_transformer_blocks) == 8


def test_the_scheduler_has_the_settings_of_flux_dev():
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_pretrained(afcache.mini_flux_folder() / "scheduler")
    expected = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "max_image_seq_len": 4096}
    assert {name: scheduler.config[name] for name in expected} == expected


def test_a_plain_call_draws_the_trained_size(pipe):
    image = pipe("a handwritten seven on a flower", num_inference_steps=2, max_sequence_length=16).images[0]
    assert image.size == (32, 32)
    assert recommended_settings(afcache.mini_flux_folder()) == {
        "height": 32,
        "width": 32,
        "max_sequence_length": 16,
        "true_cfg_scale": 2.0,
    }


def test_recommended_settings_of_other_folders_are_empty(tmp_path):
    assert recommended_settings(tmp_path) == recommended_settings(str(tmp_path)) == {}


@pytest.mark.parametrize("text", ["a handwritten seven on a flower", "A handwritten seven on a flower"])
def test_prompts_are_encoded_word_by_word(pipe, text: str):
    assert len(pipe.tokenizer_2(text).input_ids) == 7
    assert pipe.tokenizer_2.unk_token_id not in pipe.tokenizer_2(text).input_ids
    assert len(pipe.tokenizer(text).input_ids) == 8


def test_any_text_can_be_encoded(pipe):
    ids = pipe.tokenizer_2("zebra 42!").input_ids
    assert pipe.tokenizer_2.unk_token_id not in ids


@pytest.mark.host
def test_the_prompt_matters_and_the_picture_is_one(pipe):
    def draw(prompt: str) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 8, "max_sequence_length": 16, "generator": generator, "output_type": "np"}
        return pipe(prompt, **options).images[0]

    seven, one = draw("a handwritten seven on a flower"), draw("a handwritten one on a palace")
    assert afcache.psnr(seven, one) < 20
    # A white digit on a darker ground: bright pixels exist and are the minority.
    bright = (seven.min(axis=-1) > 0.8).mean()
    assert 0.02 < bright < 0.6


def test_mini_wan_draws_a_clip_of_the_trained_size():
    pipe: Any = afcache.load_mini_wan()
    pipe.set_progress_bar_config(disable=True)
    settings = {**afcache.recommended_settings(afcache.mini_wan_folder()), "num_inference_steps": 2}
    clip = pipe("a handwritten seven moves left over a flower", output_type="np", **settings).frames
    assert clip.shape == (1, 17, 32, 32, 3)
    assert 3e6 < sum(p.numel() for p in pipe.transformer.parameters()) < 3.2e6
    assert sum(path.stat().st_size for path in afcache.mini_wan_folder().rglob("*") if path.is_file()) < 8 * MIB
