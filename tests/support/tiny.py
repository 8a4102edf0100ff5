"""The smallest transformers that have every part."""

from typing import Any

from diffusers import FluxTransformer2DModel


def tiny_flux(**changes: Any) -> Any:
    """Random weights, one block of each kind, width 16; `changes` are arguments of the host's class."""
    sizes: dict[str, Any] = {
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 4,
        "pooled_projection_dim": 4,
        "guidance_embeds": False,
        "axes_dims_rope": (2, 2, 4),
    }
    return FluxTransformer2DModel(**{**sizes, **changes}).eval()
