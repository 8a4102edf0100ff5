"""The small models' parts, untrained."""

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from afcache._typing import HostModule
from bench.mini_flux.recipe import MINI_FLUX, Recipe

LATENT_CHANNELS = 8
TEXT_DIM = 64


def build_vae(recipe: Recipe = MINI_FLUX) -> HostModule:
    """Make the autoencoder: latents of 8 channels, half as high and wide as the image."""
    return AutoencoderKL(
        block_out_channels=recipe.vae_channels,  # pyright: ignore[reportArgumentType]
        down_block_types=("DownEncoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=recipe.image_size,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_transformer(recipe: Recipe = MINI_FLUX) -> HostModule:
    """Make the flow transformer of a recipe's shape."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        guidance_embeds=False,
        **recipe.transformer,
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
