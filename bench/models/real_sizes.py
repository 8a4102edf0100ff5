"""Families at their real sizes, without weights: what their transformers are called with at a common resolution."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import diffusers
import torch

from bench.models.random_flux import default_dtype

DTYPE = torch.bfloat16


class RealSize(NamedTuple):
    """A model at its real size.

    Attributes:
        title: its name, and what is drawn.
        transformer: class's name; its defaults are the model's own.
        arguments: `() -> arguments` of its forward, for one image or clip, and one branch of guidance.
        blocks: of the transformer.
        dim: width of a token.
        tokens: of the sample, as the blocks see it; text: of the prompt.
        is_joint: whether text and sample attend to each other in one sequence; else the sample to itself, and to the text.
        settings: where the model differs from its class's defaults.

    """

    title: str
    transformer: str
    arguments: Callable[[], dict[str, Any]]
    blocks: int
    dim: int
    tokens: int
    text: int
    is_joint: bool = True
    settings: Mapping[str, Any] = MappingProxyType({})

    @property
    def attention_flops(self) -> float:
        """4 FLOPs for each query, key and channel, of all blocks."""
        if self.is_joint:
            return 4.0 * self.blocks * self.dim * (self.tokens + self.text) ** 2
        return 4.0 * self.blocks * self.dim * self.tokens * (self.tokens + self.text)

    def make(self) -> Any:
        """The transformer; under a fake mode it has no weights."""
        with default_dtype(DTYPE):
            return getattr(diffusers, self.transformer)(**self.settings).eval()


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DTYPE)


def _flux2() -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, 4096, 128),
        "encoder_hidden_states": _noise(1, 512, 15360),
        "timestep": torch.ones(1, dtype=DTYPE),
        "img_ids": torch.zeros(1, 4096, 4),
        "txt_ids": torch.zeros(1, 512, 4),
        "guidance": torch.ones(1),
    }


def _qwen_image() -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, 4096, 64),
        "encoder_hidden_states": _noise(1, 512, 3584),
        "encoder_hidden_states_mask": torch.ones(1, 512, dtype=torch.int64),
        "timestep": torch.ones(1, dtype=DTYPE),
        "img_shapes": [[(1, 64, 64)]],
    }


def _wan() -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, 16, 21, 90, 160),
        "timestep": torch.full((1,), 999, dtype=torch.int64),
        "encoder_hidden_states": _noise(1, 512, 4096),
    }


def _hunyuan_video() -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, 16, 33, 90, 160),
        "timestep": torch.full((1,), 1000, dtype=DTYPE),
        "encoder_hidden_states": _noise(1, 256, 4096),
        "encoder_attention_mask": torch.ones(1, 256, dtype=torch.int64),
        "pooled_projections": _noise(1, 768),
        "guidance": torch.ones(1, dtype=DTYPE),
    }


REAL_SIZES = {
    "flux2": RealSize("FLUX.2-dev, 1024 x 1024", "Flux2Transformer2DModel", _flux2, 56, 6144, 4096, 512),
    "qwen_image": RealSize("Qwen-Image, 1024 x 1024", "QwenImageTransformer2DModel", _qwen_image, 60, 3072, 4096, 512),
    "wan22_a14b": RealSize(
        "Wan 2.2 A14B (one expert), 1280 x 720, 81 frames", "WanTransformer3DModel", _wan, 40, 5120, 75600, 512, is_joint=False
    ),
    "hunyuan_video": RealSize(
        "HunyuanVideo, 1280 x 720, 129 frames", "HunyuanVideoTransformer3DModel", _hunyuan_video, 60, 3072, 118800, 256
    ),
}
