"""mini-FLUX's parts, untrained."""

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from afcache._typing import HostModule
from bench.mini_flux import data, text

LATENT_CHANNELS = 8


def build_vae() -> HostModule:
    """Make the autoencoder: 32 x 32 pixels to 16 x 16 latents of 8 channels."""
    return AutoencoderKL(
        block_out_channels=(24, 48),  # pyright: ignore[reportArgumentType]
        down_block_types=("DownEncoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=data.IMAGE_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_transformer() -> HostModule:
    """Make the flow transformer: 4 double and 8 single blocks, width 96."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=text.TEXT_DIM,
        pooled_projection_dim=text.TEXT_DIM,
        guidance_embeds=False,
        axes_dims_rope=(4, 14, 14),
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Make FLUX.1-dev's scheduler."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
