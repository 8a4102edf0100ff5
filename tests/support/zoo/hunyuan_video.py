"""HunyuanVideo and HunyuanVideo 1.5, tiny: text and image."""

from typing import Any

from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, noise, ones, picture, scale
from tests.support.zoo.parts_video import of_config

CHANNELS, TEXT, POOLED, TOKENS = 4, 16, 8, 6
WIDTH, HEIGHT, FRAMES = 64, 32, 9
TRUE_CFG = {"true_cfg_scale": 3.0}
NAMES = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def _heed(model: Any, **sizes: Any) -> Any:
    """A transformer that looks at the text much, as few blocks are to make a prompt matter."""
    made = build(model, gain=0.85, **sizes)
    return scale(made, 3.0, *(f"transformer_blocks.{index}.attn.norm_added_k" for index in range(2)))


def _transformer(**changes: Any) -> Any:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "num_single_layers": 2}
    sizes |= {"in_channels": CHANNELS, "out_channels": CHANNELS, "num_refiner_layers": 1, "mlp_ratio": 2.0}
    sizes |= {"text_embed_dim": TEXT, "pooled_projection_dim": POOLED, "rope_axes_dim": (4, 4, 4)}
    return _heed(HunyuanVideoTransformer3DModel, **{**sizes, **changes})


def _make(pipeline: Any, shift: float = 7.0, **changes: Any) -> Any:
    blocks: dict[str, Any] = {"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2}
    vae = build(AutoencoderKLHunyuanVideo, 1, latent_channels=CHANNELS, **blocks)
    processor = ["image_processor"] if pipeline is HunyuanVideoImageToVideoPipeline else []
    parts = {"transformer": _transformer(**changes), "vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler(shift=shift)}
    return pipeline(**dict.fromkeys([*NAMES, *processor]), **parts)


def make_text() -> Any:
    return _make(HunyuanVideoPipeline)


def make_image() -> Any:
    image = {"in_channels": 2 * CHANNELS + 1, "image_condition_type": "latent_concat", "guidance_embeds": False}
    return _make(HunyuanVideoImageToVideoPipeline, **image)


def make_image_replaced() -> Any:
    return _make(HunyuanVideoImageToVideoPipeline, image_condition_type="token_replace", guidance_embeds=True)


def _make_15(pipeline: Any, guided: bool, shift: float, **more: Any) -> Any:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "num_refiner_layers": 1}
    sizes |= {"in_channels": 2 * CHANNELS + 1, "out_channels": CHANNELS, "mlp_ratio": 2.0, "text_embed_dim": TEXT}
    sizes |= {"text_embed_2_dim": 12, "image_embed_dim": 16, "rope_axes_dim": (4, 4, 4), "target_size": 64}
    changes = more.pop("changes", {})
    blocks: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8, 8), "layers_per_block": 1, "latent_channels": CHANNELS}
    pipe = pipeline(
        transformer=_heed(HunyuanVideo15Transformer3DModel, **{**sizes, **changes}),
        vae=build(AutoencoderKLHunyuanVideo15, 1, **blocks),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        guider=ClassifierFreeGuidance(guidance_scale=6.0, enabled=guided),
        **dict.fromkeys(NAMES),
        **more,
    )
    pipe.vision_num_semantic_tokens = 8
    return pipe


def make_text_15(guided: bool = True) -> Any:
    return _make_15(HunyuanVideo15Pipeline, guided, 5.0)


def make_image_15(guided: bool = True, **changes: Any) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = build(of_config(SiglipVisionModel, SiglipVisionConfig), 2, image_size=16, patch_size=8, **sizes)
    image = {"image_encoder": encoder, "feature_extractor": SiglipImageProcessor(size={"height": 16, "width": 16})}
    return _make_15(HunyuanVideo15ImageToVideoPipeline, guided, 5.0, changes=changes, **image)


def make_image_15_meanflow() -> Any:
    return make_image_15(False, use_meanflow=True)


def text(pipe: Any, prompt: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {"width": WIDTH, "height": HEIGHT, "num_frames": FRAMES, "output_type": "latent"}
    for prefix, index in (("", prompt), ("negative_", 2)):
        arguments[prefix + "prompt_embeds"] = embeddings(index, TOKENS, TEXT)
        arguments[prefix + "pooled_prompt_embeds"] = noise(1, POOLED, seed=200 + index)
        arguments[prefix + "prompt_attention_mask"] = ones(1, TOKENS)
    return arguments


def _image(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**text(pipe, prompt), "image": picture(WIDTH, HEIGHT)}


def text_15(pipe: Any, prompt: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {"width": 2 * WIDTH, "height": 2 * HEIGHT, "num_frames": FRAMES, "output_type": "latent"}
    for prefix, index in (("", prompt), ("negative_", 2)):
        arguments[prefix + "prompt_embeds"] = embeddings(index, TOKENS, TEXT)
        arguments[prefix + "prompt_embeds_mask"] = ones(1, TOKENS)
        arguments[prefix + "prompt_embeds_2"] = embeddings(index, 4, 12)
        arguments[prefix + "prompt_embeds_mask_2"] = ones(1, 4)
    return arguments


def _image_15(pipe: Any, prompt: int) -> dict[str, Any]:
    arguments = {**text_15(pipe, prompt), "image": picture(2 * WIDTH, 2 * HEIGHT)}
    return {name: value for name, value in arguments.items() if name not in ("width", "height")}


KINDS = [
    Kind("HunyuanVideoPipeline", "HunyuanVideo", make_text, text, TRUE_CFG, {}),
    Kind("HunyuanVideoImageToVideoPipeline", "HunyuanVideo", make_image, _image, TRUE_CFG, {}),
    Kind("HunyuanVideoImageToVideoPipeline [token replace]", "HunyuanVideo", make_image_replaced, _image, TRUE_CFG, {}),
    Kind("HunyuanVideo15Pipeline", "HunyuanVideo 1.5", make_text_15, text_15, {}),
    Kind("HunyuanVideo15Pipeline [unguided]", "HunyuanVideo 1.5", lambda: make_text_15(False), text_15, None, {}),
    Kind("HunyuanVideo15ImageToVideoPipeline", "HunyuanVideo 1.5", make_image_15, _image_15, {}),
    Kind("HunyuanVideo15ImageToVideoPipeline [mean flow]", "HunyuanVideo 1.5", make_image_15_meanflow, _image_15, None, {}),
]
