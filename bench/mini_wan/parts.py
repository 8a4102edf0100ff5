"""mini-Wan's parts, untrained."""

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

from afcache.assets import mini_wan_folder
from bench.mini_wan import text

# Where the trained model is, in diffusers' layout, and the one of two experts.
WEIGHTS = mini_wan_folder()
EXPERTS = Path(__file__).parent / "experts"
LATENT_CHANNELS = 8
BASE_DIM = 16
LAYERS = 8


def build_vae() -> Any:
    """Make the autoencoder: 17 frames of 32 x 32 pixels to 9 latent frames of 16 x 16 with 8 channels."""
    return AutoencoderKLWan(
        base_dim=BASE_DIM,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )


def build_transformer() -> Any:
    """Make the flow transformer: 8 blocks, width 160 (4 heads of 40), 576 tokens."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=40,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=text.TEXT_DIM,
        freq_dim=256,
        ffn_dim=448,
        num_layers=LAYERS,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )


def build_scheduler() -> Any:
    """Make Wan's scheduler, which WanPipeline does not name among its types."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        num_train_timesteps=1000,
    )
