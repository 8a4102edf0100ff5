"""Random weights by name: what compare_compiled can make, and how each is called."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bench.models import random_flux, random_qwen_image, random_wan
from bench.models.random_parts import Size


class RandomModel(NamedTuple):
    """A pipeline of random weights, for costs.

    Attributes:
        shape: of the model, in words.
        make_transformer: on the default device, in the default dtype; the same weights each time.
        make_pipeline: `(transformer) -> pipeline`: the class that users call, without text encoder and autoencoder.
        draw: `(pipeline, tokens, seed=, steps=) -> latents`.
        tokens: `(side) -> number`: image tokens of a picture or video whose sides have so many pixels.
        side: pixels, unless somebody asks for others.
        calls: of the transformer at each step.

    """

    shape: str
    make_transformer: Callable[[], Any]
    make_pipeline: Callable[[Any], Any]
    draw: Callable[..., np.ndarray]
    tokens: Callable[[int], int]
    side: int
    calls: int = 1


def _flux(size: random_flux.Size) -> RandomModel:
    return RandomModel(
        f"FLUX.1 of {size.double} + {size.single} blocks, width {size.dim}, guidance embedded",
        lambda: random_flux.make_transformer(dim=size.dim, double=size.double, single=size.single),
        random_flux.make_pipeline,
        random_flux.draw_random,
        lambda side: (side // 16) ** 2,
        int(size.tokens**0.5) * 16,
    )


def _qwen_image(size: Size) -> RandomModel:
    return RandomModel(
        f"Qwen-Image of {size.layers} blocks, {size.heads} heads of {size.head_dim}, true CFG {random_qwen_image.GUIDANCE:g}: "
        "two calls a step, one after the other",
        lambda: random_qwen_image.make_transformer(size),
        random_qwen_image.make_pipeline,
        random_qwen_image.draw_random,
        lambda side: (side // 16) ** 2,
        int(size.tokens**0.5) * 16,
        calls=2,
    )


def _wan(size: Size) -> RandomModel:
    return RandomModel(
        f"Wan 2.1 of {size.layers} blocks, {size.heads} heads of {size.head_dim}, {random_wan.FRAMES} latent frames, UniPC, "
        f"guidance {random_wan.GUIDANCE:g}: two calls a step, one after the other",
        lambda: random_wan.make_transformer(size),
        random_wan.make_pipeline,
        random_wan.draw_random,
        lambda side: random_wan.FRAMES * (side // 16) ** 2,
        int((size.tokens // random_wan.FRAMES) ** 0.5) * 16,
        calls=2,
    )


RANDOM: dict[str, RandomModel] = {
    **{name: _flux(size) for name, size in random_flux.SIZES.items()},
    **{f"qwen_image_{name}": _qwen_image(size) for name, size in random_qwen_image.SIZES.items()},
    **{f"wan_{name}": _wan(size) for name, size in random_wan.SIZES.items()},
}
