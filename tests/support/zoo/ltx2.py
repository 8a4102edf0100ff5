"""LTX-2, tiny: video and audio of text, of an image, and of conditions."""

from typing import Any

from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ConditionPipeline,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, ones, picture
from tests.support.zoo.parts_video import parts_of

CHANNELS, AUDIO_CHANNELS, MELS, TEXT, TOKENS = 8, 2, 8, 24, 8
WIDTH, HEIGHT, FRAMES = 128, 64, 17
PLAIN = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
ON = {"guidance_scale": 3.0, "audio_guidance_scale": 7.0}
OFF = {"guidance_scale": 1.0, "audio_guidance_scale": 1.0}


def _transformer(**changes: Any) -> Any:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24, "num_layers": 2}
    sizes |= {"in_channels": CHANNELS, "out_channels": CHANNELS, "caption_channels": TEXT, "rope_type": "split"}
    audio: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16}
    audio |= {"in_channels": AUDIO_CHANNELS * MELS // 4, "out_channels": AUDIO_CHANNELS * MELS // 4}
    sizes |= {f"audio_{name}": value for name, value in audio.items()}
    return build(LTX2VideoTransformer3DModel, **{**sizes, **changes})


def _connectors() -> Any:
    sizes: dict[str, Any] = {"caption_channels": TEXT, "text_proj_in_factor": 2, "rope_type": "split"}
    for name in ("video", "audio"):
        sizes |= {f"{name}_connector_num_attention_heads": 2, f"{name}_connector_attention_head_dim": TEXT // 2}
        sizes |= {f"{name}_connector_num_layers": 1, f"{name}_connector_num_learnable_registers": 4}
    return build(LTX2TextConnectors, 3, **sizes)


def parts(**changes: Any) -> dict[str, Any]:
    blocks: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 16, 32)}
    blocks |= {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 4, "latent_channels": CHANNELS}
    blocks |= {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    audio: dict[str, Any] = {"base_channels": AUDIO_CHANNELS * MELS // 4, "num_res_blocks": 1, "mel_bins": MELS}
    voice: dict[str, Any] = {
        "in_channels": 2 * MELS,
        "hidden_channels": 4,
        "upsample_kernel_sizes": [4],
        "upsample_factors": [2],
    }
    shifts = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024}
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift_terminal=0.1, **shifts),
        "vae": build(AutoencoderKLLTX2Video, 1, **blocks),
        "audio_vae": build(AutoencoderKLLTX2Audio, 2, latent_channels=AUDIO_CHANNELS, ch_mult=(1, 1, 1), **audio),
        "text_encoder": None,
        "tokenizer": None,
        "connectors": _connectors(),
        "transformer": _transformer(**changes),
        "vocoder": build(LTX2Vocoder, 4, **voice),
    }


def make_text() -> Any:
    return LTX2Pipeline(**parts())


def make_text_perturbed() -> Any:
    """As LTX-2.3, whose blocks can leave attention out, and modulate what they read of the prompt."""
    gates = dict.fromkeys(("gated_attn", "audio_gated_attn", "cross_attn_mod", "audio_cross_attn_mod", "perturbed_attn"), True)
    return LTX2Pipeline(**parts(**gates))


def make_image() -> Any:
    return LTX2ImageToVideoPipeline(**parts())


def make_conditions() -> Any:
    return LTX2ConditionPipeline(**parts())


def text(pipe: Any, prompt: int) -> dict[str, Any]:
    embeds = {"prompt_embeds": embeddings(prompt, TOKENS, 2 * TEXT), "negative_prompt_embeds": embeddings(2, TOKENS, 2 * TEXT)}
    masks = {"prompt_attention_mask": ones(1, TOKENS), "negative_prompt_attention_mask": ones(1, TOKENS)}
    size = {"width": WIDTH, "height": HEIGHT, "num_frames": FRAMES}
    return {**embeds, **masks, **size, **PLAIN, "output_type": "latent"}


def _perturbed(pipe: Any, prompt: int) -> dict[str, Any]:
    arguments = {name: value for name, value in text(pipe, prompt).items() if name not in PLAIN}
    return {**arguments, "spatio_temporal_guidance_blocks": [1]}


def _image(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**text(pipe, prompt), "image": picture(WIDTH, HEIGHT), "image_crf": 0}


def _conditions(pipe: Any, prompt: int) -> dict[str, Any]:
    last = LTX2VideoCondition(frames=picture(WIDTH, HEIGHT), index=-1, strength=0.8, crf=0)
    return {**text(pipe, prompt), "conditions": [last]}


KINDS = [
    Kind("LTX2Pipeline", "LTX-2", make_text, text, ON, OFF, latents=parts_of),
    Kind("LTX2Pipeline [perturbed]", "LTX-2", make_text_perturbed, _perturbed, ON, {**OFF, **PLAIN}, latents=parts_of),
    Kind("LTX2ImageToVideoPipeline", "LTX-2", make_image, _image, ON, OFF, latents=parts_of),
    Kind("LTX2ConditionPipeline", "LTX-2", make_conditions, _conditions, ON, OFF, latents=parts_of),
]
