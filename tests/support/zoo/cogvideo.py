"""CogVideoX, tiny: text, image, video and control; with both of its schedulers."""

from typing import Any

from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXFunControlPipeline,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
)

from tests.support.zoo.kind import Kind
from tests.support.zoo.parts import build, embeddings, picture
from tests.support.zoo.parts_video import clip

CHANNELS, TEXT, TOKENS = 4, 16, 6
WIDTH, HEIGHT, FRAMES = 64, 32, 9
FAMILY = "CogVideoX"
ON, OFF = {"guidance_scale": 6.0}, {"guidance_scale": 1.0}


def _make(pipeline: Any, scheduler: Any = CogVideoXDDIMScheduler, snr_shift: float = 3.0, **changes: Any) -> Any:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "time_embed_dim": 16}
    sizes |= {"in_channels": CHANNELS, "out_channels": CHANNELS, "text_embed_dim": TEXT, "max_text_seq_length": TOKENS}
    sizes |= {"sample_width": WIDTH // 8, "sample_height": HEIGHT // 8, "sample_frames": FRAMES}
    blocks: dict[str, Any] = {"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2}
    betas: dict[str, Any] = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return pipeline(
        tokenizer=None,
        text_encoder=None,
        vae=build(AutoencoderKLCogVideoX, 1, latent_channels=CHANNELS, **blocks),
        transformer=build(CogVideoXTransformer3DModel, **{**sizes, **changes}),
        scheduler=scheduler(snr_shift_scale=snr_shift, **betas),
    )


def make_text() -> Any:
    """As CogVideoX-2b."""
    return _make(CogVideoXPipeline)


def make_text_later() -> Any:
    """As CogVideoX1.5-5B, whose patches span two frames."""
    rotary = {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False}
    return _make(CogVideoXPipeline, CogVideoXDDIMScheduler, 1.0, **rotary)


def make_image() -> Any:
    """As CogVideoX-5b-I2V."""
    rotary = {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}
    return _make(CogVideoXImageToVideoPipeline, CogVideoXDDIMScheduler, 1.0, in_channels=2 * CHANNELS, **rotary)


def make_video() -> Any:
    return _make(CogVideoXVideoToVideoPipeline, CogVideoXDDIMScheduler, 1.0, use_rotary_positional_embeddings=True)


def make_noisy() -> Any:
    """With the scheduler of CogVideoX-5b, which adds noise at every step."""
    return _make(CogVideoXPipeline, CogVideoXDPMScheduler, 1.0, use_rotary_positional_embeddings=True)


def make_control() -> Any:
    rotary = {"use_rotary_positional_embeddings": True, "in_channels": 2 * CHANNELS}
    return _make(CogVideoXFunControlPipeline, CogVideoXDDIMScheduler, 1.0, **rotary)


def _still(pipe: Any, prompt: int) -> dict[str, Any]:
    embeds = {"prompt_embeds": embeddings(prompt, TOKENS, TEXT), "negative_prompt_embeds": embeddings(2, TOKENS, TEXT)}
    return {**embeds, "width": WIDTH, "height": HEIGHT, "output_type": "latent"}


def _text(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**_still(pipe, prompt), "num_frames": FRAMES}


def _image(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**_text(pipe, prompt), "image": picture(WIDTH, HEIGHT)}


def _video(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**_still(pipe, prompt), "video": clip(WIDTH, HEIGHT, FRAMES), "strength": 0.8}


def _control(pipe: Any, prompt: int) -> dict[str, Any]:
    return {**_still(pipe, prompt), "control_video": clip(WIDTH, HEIGHT, FRAMES)}


DYNAMIC = {**ON, "use_dynamic_cfg": True}
KINDS = [
    Kind("CogVideoXPipeline", FAMILY, make_text, _text, ON, OFF),
    Kind("CogVideoXPipeline [1.5, dynamic guidance]", FAMILY, make_text_later, _text, DYNAMIC, OFF),
    Kind("CogVideoXImageToVideoPipeline", FAMILY, make_image, _image, ON, OFF),
    Kind("CogVideoXVideoToVideoPipeline", FAMILY, make_video, _video, ON, OFF),
    Kind("CogVideoXFunControlPipeline", FAMILY, make_control, _control, ON, OFF),
    Kind("CogVideoXPipeline [new noise]", FAMILY, make_noisy, _text, ON, OFF),
]
