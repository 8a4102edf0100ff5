"""Every FLUX.1 pipeline of diffusers, tiny: mini-FLUX's weights where they fit, and what a class needs besides."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from PIL import Image

import afcache

SIZE = 32
TEXT = {"prompt": "a handwritten two on a palace", "max_sequence_length": 16}
SQUARE = {"height": SIZE, "width": SIZE}


def picture(seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A smooth picture, not noise."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert(mode)


def mask() -> Image.Image:
    """The right half is to be drawn."""
    return Image.fromarray(np.repeat(np.arange(SIZE)[None] >= SIZE // 2, SIZE, axis=0).astype(np.uint8) * 255)


class Kind(NamedTuple):
    """A pipeline class and how it is called.

    Attributes:
        name: of the class.
        extra_channels: that its transformer takes beside the latents'.
        arguments: of a call, beside prompt and steps.
        has_controlnet: whether it has one.
        guided: whether it knows true CFG.

    """

    name: str
    arguments: Callable[[], dict[str, Any]]
    extra_channels: int = 0
    has_controlnet: bool = False
    guided: bool = False


KINDS = [
    Kind("FluxPipeline", lambda: SQUARE, guided=True),
    Kind("FluxImg2ImgPipeline", lambda: {"image": picture(), "strength": 0.9, **SQUARE}, guided=True),
    Kind("FluxInpaintPipeline", lambda: {"image": picture(), "mask_image": mask(), "strength": 0.9, **SQUARE}, guided=True),
    Kind("FluxFillPipeline", lambda: {"image": picture(), "mask_image": mask(), **SQUARE}, extra_channels=32 + 16),
    Kind("FluxControlPipeline", lambda: {"control_image": picture(), **SQUARE}, extra_channels=32),
    Kind(
        "FluxControlImg2ImgPipeline",
        lambda: {"image": picture(), "control_image": picture(1), "strength": 0.9, **SQUARE},
        extra_channels=32,
    ),
    Kind(
        "FluxControlInpaintPipeline",
        lambda: {"image": picture(), "control_image": picture(1), "mask_image": mask(), "strength": 0.9, **SQUARE},
        extra_channels=32,
    ),
    Kind("FluxControlNetPipeline", lambda: {"control_image": picture(), **SQUARE}, has_controlnet=True, guided=True),
    Kind(
        "FluxControlNetImg2ImgPipeline",
        lambda: {"image": picture(), "control_image": picture(1), "strength": 0.9, **SQUARE},
        has_controlnet=True,
    ),
    Kind(
        "FluxControlNetInpaintPipeline",
        lambda: {"image": picture(), "control_image": picture(1), "mask_image": mask(), "strength": 0.9, **SQUARE},
        has_controlnet=True,
    ),
    Kind(
        "FluxKontextPipeline",
        lambda: {"image": picture(), "max_area": SIZE**2, "_auto_resize": False, **SQUARE},
        guided=True,
    ),
    Kind(
        "FluxKontextInpaintPipeline",
        lambda: {"image": picture(), "mask_image": mask(), "max_area": SIZE**2, "_auto_resize": False, **SQUARE},
        guided=True,
    ),
]
BY_NAME = {kind.name: kind for kind in KINDS}


def make(kind: Kind, *, double: int = 2, single: int = 2) -> Any:
    """A pipeline of a few of mini-FLUX's blocks."""
    mini = afcache.load_mini_flux()
    parts: dict[str, Any] = {name: part for name, part in mini.components.items() if part is not None}
    parts["transformer"] = shorten(mini.transformer, double, single, kind.extra_channels)
    if kind.has_controlnet:
        parts["controlnet"] = make_controlnet(mini.transformer)
    pipe = getattr(diffusers, kind.name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shorten(transformer: Any, double: int, single: int, extra_channels: int) -> Any:
    """The first blocks of both kinds, and an embedding that takes more channels."""
    config = dict(transformer.config)
    channels = config["in_channels"]
    changes = {"in_channels": channels + extra_channels, "out_channels": channels}
    changes |= {"num_layers": double, "num_single_layers": single}
    torch.manual_seed(0)
    short: Any = FluxTransformer2DModel.from_config({**config, **changes})
    own = short.state_dict()
    weights = {name: value for name, value in transformer.state_dict().items() if name in own}
    embedding = own["x_embedder.weight"]
    embedding[:, :channels] = weights["x_embedder.weight"]
    embedding[:, channels:] *= 0.3
    short.load_state_dict({**weights, "x_embedder.weight": embedding})
    return short.eval()


def make_controlnet(transformer: Any, *, double: int = 1, single: int = 1) -> Any:
    """One whose residuals are not the zeros that training starts from."""
    config = {key: value for key, value in transformer.config.items() if key not in ("out_channels",)}
    torch.manual_seed(1)
    net: Any = FluxControlNetModel.from_config({**config, "num_layers": double, "num_single_layers": single})
    for block in [*net.controlnet_blocks, *net.controlnet_single_blocks, net.controlnet_x_embedder]:
        torch.nn.init.normal_(block.weight, std=0.1)
    return net.eval()


def draw(pipe: Any, kind: Kind, *, steps: int = 12, seed: int = 0, **changes: Any) -> torch.Tensor:
    """Final latents of one image."""
    arguments = {**TEXT, **kind.arguments(), "num_inference_steps": steps, **changes}
    generator = torch.Generator().manual_seed(seed)
    return pipe(**arguments, generator=generator, output_type="latent").images
