"""Wan 2.1 and 2.2, tiny: text, image, first and last frame, control video, and video to video."""

from typing import Any

from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, picture
from tests.support.zoo.parts_video import clip, of_config

CHANNELS, TEXT, IMAGE = 4, 16, 16
WIDTH, HEIGHT, FRAMES = 64, 32, 9
VIDEO = {"width": WIDTH, "height": HEIGHT, "num_frames": FRAMES}
ON, OFF = {"guidance_scale": 5.0}, {"guidance_scale": 1.0}


def _transformer(cls: Any = WanTransformer3DModel, seed: int = 0, **changes: Any) -> Any:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 32}
    sizes |= {"in_channels": CHANNELS, "out_channels": CHANNELS, "text_dim": TEXT, "freq_dim": 16, "rope_max_seq_len": 32}
    return build(cls, seed, **{**sizes, **changes})


def _vae(channels: int = CHANNELS, **changes: Any) -> Any:
    sizes: dict[str, Any] = {"base_dim": 4, "z_dim": channels, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    statistics = {"latents_mean": [0.1] * channels, "latents_std": [1.5] * channels}
    return build(AutoencoderKLWan, 1, **{**sizes, **statistics, **changes})


def _scheduler(shift: float) -> Any:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def parts(transformer: Any, shift: float = 3.0, **more: Any) -> dict[str, Any]:
    parts = {"tokenizer": None, "text_encoder": None, "vae": _vae(), "scheduler": _scheduler(shift)}
    return {**parts, "transformer": transformer, **more}


def image_encoder() -> dict[str, Any]:
    sizes: dict[str, Any] = {"hidden_size": IMAGE, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = build(of_config(CLIPVisionModel, CLIPVisionConfig), 2, image_size=16, patch_size=8, **sizes)
    size = {"height": 16, "width": 16}
    return {"image_encoder": encoder, "image_processor": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)}


def make_text(channels: int = CHANNELS) -> Any:
    return WanPipeline(**parts(_transformer(in_channels=channels, out_channels=channels)))


def make_experts(channels: int = CHANNELS) -> Any:
    experts = [_transformer(seed=seed, in_channels=channels, out_channels=channels) for seed in (0, 5)]
    return WanPipeline(**parts(experts[0], transformer_2=experts[1], boundary_ratio=0.875))


def make_text_image() -> Any:
    vae = _vae(8, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, is_residual=True)
    transformer = _transformer(in_channels=8, out_channels=8)
    return WanPipeline(**parts(transformer, 5.0, vae=vae, expand_timesteps=True))


def make_image() -> Any:
    transformer = _transformer(in_channels=2 * CHANNELS + 4, image_dim=IMAGE, added_kv_proj_dim=24)
    return WanImageToVideoPipeline(**parts(transformer, **image_encoder()))


def make_first_last() -> Any:
    transformer = _transformer(in_channels=2 * CHANNELS + 4, image_dim=IMAGE, added_kv_proj_dim=24, pos_embed_seq_len=10)
    return WanImageToVideoPipeline(**parts(transformer, 5.0, **image_encoder()))


def make_image_experts() -> Any:
    experts = [_transformer(in_channels=2 * CHANNELS + 4, seed=seed) for seed in (0, 5)]
    return WanImageToVideoPipeline(**parts(experts[0], transformer_2=experts[1], boundary_ratio=0.9))


def make_image_expanded() -> Any:
    pipe = make_text_image()
    names = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    return WanImageToVideoPipeline(**{name: getattr(pipe, name) for name in names}, expand_timesteps=True)


def make_control(seed: int = 0) -> Any:
    control = {"vace_layers": [0, 1], "vace_in_channels": 2 * CHANNELS + 64}
    return WanVACEPipeline(**parts(_transformer(WanVACETransformer3DModel, seed, **control)))


def make_video() -> Any:
    return WanVideoToVideoPipeline(**parts(_transformer()))


def make_animate() -> Any:
    face: dict[str, Any] = {"motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8}
    face |= {"motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "face_encoder_hidden_dim": 8}
    face |= {"face_encoder_num_heads": 2, "inject_face_latents_blocks": 2}
    sizes = {"in_channels": 2 * CHANNELS + 4, "latent_channels": CHANNELS, "image_dim": IMAGE, "added_kv_proj_dim": 24}
    return WanAnimatePipeline(**parts(_transformer(WanAnimateTransformer3DModel, **sizes, **face), 5.0, **image_encoder()))


def text(pipe: Any, prompt: int) -> dict[str, Any]:
    embeds = {"prompt_embeds": embeddings(prompt, 8, TEXT), "negative_prompt_embeds": embeddings(2, 8, TEXT)}
    return {**embeds, **VIDEO, "output_type": "latent"}


def _text_image(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**text(pipe, prompt), "width": 2 * WIDTH, "height": 2 * HEIGHT}


def image(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**text(pipe, prompt), "image": picture(WIDTH, HEIGHT)}


def _image_expanded(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**_text_image(pipe, prompt), "image": picture(2 * WIDTH, 2 * HEIGHT)}


def _first_last(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**image(pipe, prompt), "last_image": picture(WIDTH, HEIGHT, 1)}


def _control(pipe: Any, prompt: int) -> dict[str, Any]:
    masks = [picture(WIDTH, HEIGHT, 7, "L")] * FRAMES
    return {
        **text(pipe, prompt),
        "video": clip(WIDTH, HEIGHT, FRAMES),
        "mask": masks,
        "reference_images": [picture(WIDTH, HEIGHT, 5)],
    }


def _video(pipe: Any, prompt: int) -> dict[str, Any]:
    arguments = {**text(pipe, prompt), "video": clip(WIDTH, HEIGHT, FRAMES), "strength": 0.8}
    del arguments["num_frames"]
    return arguments


def _animate(pipe: Any, prompt: int) -> dict[str, Any]:
    arguments = {**image(pipe, prompt), "pose_video": clip(WIDTH, HEIGHT, FRAMES), "face_video": clip(16, 16, FRAMES, 3)}
    del arguments["num_frames"]
    return {**arguments, "segment_frame_length": FRAMES, "prev_segment_conditioning_frames": 1}


def _animate_on(pipe: Any, prompt: int) -> dict[str, Any]:
    """Two segments, the second from the first's last frame; the latents are the second's."""
    frames = 2 * FRAMES - 1
    return {**_animate(pipe, prompt), "pose_video": clip(WIDTH, HEIGHT, frames), "face_video": clip(16, 16, frames, 3)}


KINDS = [
    Kind("WanPipeline", "Wan 2.1", make_text, text, ON, OFF),
    Kind("WanPipeline [two experts]", "Wan 2.2", make_experts, text, {**ON, "guidance_scale_2": 3.0}, OFF),
    Kind("WanPipeline [expanded timesteps]", "Wan 2.2", make_text_image, _text_image, ON, OFF),
    Kind("WanImageToVideoPipeline", "Wan 2.1", make_image, image, ON, OFF),
    Kind("WanImageToVideoPipeline [first and last]", "Wan 2.1", make_first_last, _first_last, ON, OFF),
    Kind("WanImageToVideoPipeline [two experts]", "Wan 2.2", make_image_experts, image, ON, OFF),
    Kind("WanImageToVideoPipeline [expanded timesteps]", "Wan 2.2", make_image_expanded, _image_expanded, ON, OFF),
    Kind("WanVACEPipeline", "Wan 2.1", make_control, _control, ON, OFF),
    Kind("WanVideoToVideoPipeline", "Wan 2.1", make_video, _video, ON, OFF),
    Kind("WanAnimatePipeline", "Wan 2.2", make_animate, _animate, ON, OFF),
    Kind("WanAnimatePipeline [two segments]", "Wan 2.2", make_animate, _animate_on, ON, OFF),
]
