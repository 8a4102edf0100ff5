"""More videos, tiny: FramePack and Helios, which draw section after section, AnyFlow, Lucy Edit and Motif-Video."""

from typing import Any

import diffusers
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler
from diffusers.guiders import AdaptiveProjectedGuidance
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from tests.support.zoo import hunyuan_video, wan
from tests.support.zoo.kind import Kind, flat
from tests.support.zoo.parts import build, embeddings, ones, picture
from tests.support.zoo.parts_video import clip, of_config
from tests.support.zoo.wan import CHANNELS, OFF, ON

SIZES: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}
HUNYUAN: dict[str, Any] = {
    **SIZES,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "rope_axes_dim": (4, 4, 4),
}
WAN: dict[str, Any] = {**SIZES, "ffn_dim": 32, "text_dim": wan.TEXT, "freq_dim": 16}


def make_framepack() -> Any:
    sizes: dict[str, Any] = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "has_image_proj": True,
        "has_clean_x_embedder": True,
    }
    sizes |= {"image_proj_dim": 16, "text_embed_dim": hunyuan_video.TEXT, "pooled_projection_dim": hunyuan_video.POOLED}
    blocks: dict[str, Any] = {"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2}
    vision: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = build(of_config(SiglipVisionModel, SiglipVisionConfig), 2, image_size=16, patch_size=8, **vision)
    absent: dict[str, Any] = dict.fromkeys(hunyuan_video.NAMES)
    return diffusers.HunyuanVideoFramepackPipeline(
        transformer=build(diffusers.HunyuanVideoFramepackTransformer3DModel, gain=0.85, **HUNYUAN, **sizes),
        vae=build(AutoencoderKLHunyuanVideo, 1, latent_channels=CHANNELS, **blocks),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        image_encoder=encoder,
        feature_extractor=SiglipImageProcessor(size={"height": 16, "width": 16}),
        **absent,
    )


def make_helios() -> Any:
    sizes = {"in_channels": CHANNELS, "out_channels": CHANNELS, "rope_dim": (4, 4, 4)}
    transformer = build(diffusers.HeliosTransformer3DModel, **WAN, **sizes)
    return diffusers.HeliosPipeline(
        **{
            **wan.parts(transformer),
            "scheduler": diffusers.HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True),
        }
    )


def make_anyflow() -> Any:
    sizes = {"in_channels": CHANNELS, "out_channels": CHANNELS, "rope_max_seq_len": 32}
    transformer = build(diffusers.AnyFlowTransformer3DModel, **WAN, **sizes)
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
    return diffusers.AnyFlowPipeline(**{**wan.parts(transformer), "scheduler": scheduler})


def make_lucy() -> Any:
    sizes = {"in_channels": 2 * CHANNELS, "out_channels": CHANNELS, "rope_max_seq_len": 32}
    return diffusers.LucyEditPipeline(**wan.parts(build(diffusers.WanTransformer3DModel, **WAN, **sizes), 5.0))


def make_motif() -> Any:
    sizes = {"in_channels": 2 * CHANNELS + 1, "out_channels": CHANNELS, "text_embed_dim": wan.TEXT}
    hunyuan = {name: value for name, value in HUNYUAN.items() if name != "num_refiner_layers"}
    transformer = build(diffusers.MotifVideoTransformer3DModel, gain=0.9, **hunyuan, **sizes)
    guider = AdaptiveProjectedGuidance(guidance_scale=8.0, adaptive_projected_guidance_rescale=12.0, eta=1.0)
    parts = {**wan.parts(transformer), "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0), "guider": guider}
    return diffusers.MotifVideoPipeline(**parts)


def _framepack(pipe: Any, prompt: int) -> dict[str, Any]:
    arguments = hunyuan_video.text(pipe, prompt)
    return {**arguments, "image": picture(hunyuan_video.WIDTH, hunyuan_video.HEIGHT), "latent_window_size": 3, "num_frames": 18}


def _helios(pipe: Any, prompt: int) -> dict[str, Any]:
    sections = {"num_frames": 18, "num_latent_frames_per_chunk": 3, "history_sizes": [4, 2, 1]}
    return {**wan.text(pipe, prompt), **sections}


def _lucy(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**wan.text(pipe, prompt), "video": clip(wan.WIDTH, wan.HEIGHT, wan.FRAMES)}


def _unnegated(pipe: Any, prompt: int) -> dict[str, Any]:
    """With one, it would draw two videos even unguided."""
    return {**wan.text(pipe, prompt), "negative_prompt_embeds": None}


def _motif(pipe: Any, prompt: int) -> dict[str, Any]:
    embeds = {"prompt_embeds": embeddings(prompt, 8, wan.TEXT), "negative_prompt_embeds": embeddings(2, 8, wan.TEXT)}
    masks = {"prompt_attention_mask": ones(1, 8), "negative_prompt_attention_mask": ones(1, 8)}
    return {**embeds, **masks, **wan.VIDEO, "output_type": "latent"}


TRUE_CFG = hunyuan_video.TRUE_CFG
KINDS = [
    Kind(
        "HunyuanVideoFramepackPipeline",
        "FramePack",
        make_framepack,
        _framepack,
        TRUE_CFG,
        {},
        latents=lambda result: flat(result[0]),
    ),
    Kind("HeliosPipeline", "Helios", make_helios, _helios, ON, OFF),
    Kind(
        "AnyFlowPipeline", "AnyFlow", make_anyflow, _unnegated, {**ON, "negative_prompt_embeds": embeddings(2, 8, wan.TEXT)}, {}
    ),
    Kind("LucyEditPipeline", "Lucy Edit", make_lucy, _lucy, ON, OFF),
    Kind("MotifVideoPipeline", "Motif-Video", make_motif, _motif, {}),
]
SKIPPED = {
    "CosmosTransformer3DModel": "NameError: name 'transforms' is not defined, as torchvision is not installed",
    "all Cosmos pipelines": "ImportError: `cosmos_guardrail` is not installed. Please install it to use the safety checker",
}
