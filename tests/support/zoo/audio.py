"""Pipelines of sound, tiny: Stable Audio 3, ACE-Step and LongCat-AudioDiT."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    AceStepConditionEncoder,
    AceStepPipeline,
    AceStepTransformer1DModel,
    AutoencoderOobleck,
    AutoencoderSAME,
    FlowMatchEulerDiscreteScheduler,
    LongCatAudioDiTPipeline,
    LongCatAudioDiTTransformer,
    LongCatAudioDiTVae,
    StableAudio3AudioToAudioPipeline,
    StableAudio3DiTModel,
    StableAudio3DurationEmbedder,
    StableAudio3InpaintPipeline,
    StableAudio3Pipeline,
)
from transformers import Qwen3Config, Qwen3Model, UMT5Config, UMT5EncoderModel

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import PROMPTS, build, embeddings, noise, ones, tokenizer
from tests.support.zoo.parts_video import first_of, of_config, old_norms

CHANNELS, TEXT, TOKENS = 8, 16, 6
STABLE, ACE, LONGCAT = "Stable Audio 3", "ACE-Step", "LongCat-AudioDiT"
UNIT = {"num_train_timesteps": 1, "shift": 1.0}
ON, OFF = {"guidance_scale": 4.0}, {"guidance_scale": 1.0}


def make_stable(pipeline: Any, stochastic: bool = False) -> Any:
    sizes: dict[str, Any] = {"io_channels": CHANNELS, "embed_dim": 32, "depth": 2, "num_heads": 2, "cond_token_dim": TEXT}
    sizes |= {"global_cond_dim": TEXT, "local_add_cond_dim": CHANNELS + 1, "timestep_features_dim": 16, "num_memory_tokens": 4}
    levels: dict[str, Any] = {"patch_size": 4, "encoder_channels": 8, "encoder_c_mults": [2], "encoder_strides": [2]}
    levels |= {"encoder_transformer_depths": [1], "latent_dim": CHANNELS, "dim_heads": 8, "sampling_rate": 80}
    return pipeline(
        vae=build(old_norms(AutoencoderSAME), 1, **levels),
        text_encoder=None,
        tokenizer=None,
        duration_embedder=build(StableAudio3DurationEmbedder, 2, output_dim=TEXT, fourier_dim=16),
        transformer=build(StableAudio3DiTModel, gain=0.9, **sizes),
        scheduler=FlowMatchEulerDiscreteScheduler(stochastic_sampling=stochastic, **UNIT),
    )


def _qwen(**sizes: Any) -> Any:
    return build(of_config(Qwen3Model, Qwen3Config), 3, **sizes)


def make_ace(is_turbo: bool = False) -> Any:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8}
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, **heads}
    width = 4
    text: dict[str, Any] = {"hidden_size": TEXT, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    layers = {"num_lyric_encoder_hidden_layers": 1, "num_timbre_encoder_hidden_layers": 1}
    encoder = build(AceStepConditionEncoder, 2, text_hidden_dim=TEXT, timbre_hidden_dim=width, **layers, **sizes)
    encoder.silence_latent.copy_(0.3 * noise(*encoder.silence_latent.shape, seed=300))
    levels = {"encoder_hidden_size": 4, "decoder_channels": 4, "channel_multiples": [1, 2], "downsampling_ratios": [2, 4]}
    model = {"audio_acoustic_hidden_dim": width, "in_channels": 3 * width, "is_turbo": is_turbo, "num_hidden_layers": 2}
    return AceStepPipeline(
        vae=build(old_norms(AutoencoderOobleck), 1, decoder_input_channels=width, sampling_rate=40, **levels),
        text_encoder=_qwen(**text),
        tokenizer=tokenizer(),
        transformer=build(AceStepTransformer1DModel, **model, **sizes),
        condition_encoder=encoder,
        scheduler=FlowMatchEulerDiscreteScheduler(**UNIT),
    )


def make_longcat() -> Any:
    text: dict[str, Any] = {"vocab_size": 32, "d_model": TEXT, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    levels: dict[str, Any] = {"channels": 4, "c_mults": [1, 2], "strides": [2, 4], "encoder_latent_dim": 2 * CHANNELS}
    sizes: dict[str, Any] = {"dit_dim": 32, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": TEXT}
    return LongCatAudioDiTPipeline(
        vae=build(old_norms(LongCatAudioDiTVae), 1, latent_dim=CHANNELS, downsampling_ratio=8, sample_rate=80, **levels),
        text_encoder=build(of_config(UMT5EncoderModel, UMT5Config), 3, **text),
        tokenizer=tokenizer(),
        transformer=build(LongCatAudioDiTTransformer, latent_dim=CHANNELS, **sizes),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True),
    )


def _stable(pipe: Any, prompt: int) -> dict[str, Any]:
    embeds = {"prompt_embeds": embeddings(prompt, TOKENS, TEXT), "encoder_attention_mask": ones(1, TOKENS)}
    return {**embeds, "duration": 2.0, "output_type": "latent"}


def _guided(pipe: Any, prompt: int) -> dict[str, Any]:
    negative = {"negative_prompt_embeds": embeddings(2, TOKENS, TEXT), "negative_encoder_attention_mask": ones(1, TOKENS)}
    return {**_stable(pipe, prompt), **negative}


def _sound() -> torch.Tensor:
    return noise(1, 2, 160, seed=4).cumsum(-1) / 16


def _from_sound(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**_stable(pipe, prompt), "audio": _sound(), "init_noise_level": 0.8}


def _filled(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**_stable(pipe, prompt), "audio": _sound(), "mask_start_seconds": 0.5, "mask_end_seconds": 1.5}


def _ace(pipe: Any, prompt: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[prompt], "lyrics": PROMPTS[1 - prompt], "audio_duration": 4.0, "output_type": "latent"}


def _longcat(pipe: Any, prompt: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[prompt], "audio_duration_s": 2.0, "output_type": "latent"}


make_base = partial(make_stable, StableAudio3Pipeline)
make_distilled = partial(make_stable, StableAudio3Pipeline, True)
KINDS = [
    Kind("StableAudio3Pipeline", STABLE, make_base, _guided, ON, OFF, latents=first_of),
    Kind("StableAudio3Pipeline [distilled]", STABLE, make_distilled, _stable, None, {}, latents=first_of),
    Kind(
        "StableAudio3AudioToAudioPipeline",
        STABLE,
        partial(make_stable, StableAudio3AudioToAudioPipeline),
        _from_sound,
        latents=first_of,
    ),
    Kind("StableAudio3InpaintPipeline", STABLE, partial(make_stable, StableAudio3InpaintPipeline), _filled, latents=first_of),
    Kind("AceStepPipeline", ACE, make_ace, _ace, {"guidance_scale": 7.0}, OFF, latents=first_of),
    Kind("AceStepPipeline [turbo]", ACE, partial(make_ace, True), _ace, None, {}, latents=first_of),
    Kind("LongCatAudioDiTPipeline", LONGCAT, make_longcat, _longcat, ON, OFF, latents=first_of),
]
