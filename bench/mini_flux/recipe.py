"""The small FLUX models that are trained here: their data, their prompts and their shapes."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import afcache
from bench.mini_flux import data, stroke_images, texture_images

_FOLDER = Path(__file__).parent


class Source(Protocol):
    """Where training images come from; `device` is its images' and its generators'."""

    device: torch.device

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Random training images `[count, 3, size, size]` in [-1, 1], and their classes, int64 `[count]`."""
        ...

    def examples(self, generator: torch.Generator, *, held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Real images for the judge, and their subjects (the first value), int64."""
        ...


@dataclass(frozen=True)
class Recipe:
    """What one model draws, and how it is built.

    A class is a tuple of values, such as digit and place; its index counts them with the last value fastest.

    Attributes:
        name: as the command line knows it.
        folder: of the trained weights, in diffusers' layout.
        image_size: pixels a side.
        sizes: how many values each part of a class has; the subject, which the judge names, first.
        wordings: of a class, all of them; as many for each class, the one that benchmarks use first.
        values_of: class of a seed.
        source: makes the training images' source on a device.
        features: what the judge sees of images `[count, 3, size, size]` in [-1, 1].
        judge: makes the classifier that is trained on real images' features.
        transformer: keyword arguments, as far as the recipes differ.
        vae_channels: of the autoencoder's two levels.
        guidance: recommended true CFG scale.
        text_length: text tokens.

    """

    name: str
    folder: Path
    image_size: int
    sizes: tuple[int, ...]
    wordings: Callable[..., list[str]]
    values_of: Callable[[int], tuple[int, ...]]
    source: Callable[[torch.device | str], Source]
    features: Callable[[torch.Tensor], np.ndarray]
    transformer: dict[str, Any]
    judge: Callable[[], Any] = lambda: SVC(C=10, gamma="scale")
    vae_channels: tuple[int, int] = (24, 48)
    guidance: float = 2.0
    text_length: int = 16

    @property
    def classes(self) -> list[tuple[int, ...]]:
        """Every class, in the order of its index."""
        return list(product(*map(range, self.sizes)))

    def class_of(self, seed: int) -> int:
        """Index of the class that a seed shows, 0 to `prod(sizes) - 1`."""
        return sum(value * prod(self.sizes[i + 1 :]) for i, value in enumerate(self.values_of(seed)))

    def subject_of(self, seed: int) -> int:
        """What the judge should read in a seed's image."""
        return self.values_of(seed)[0]

    def prompt_of(self, seed: int) -> str:
        """The wording that every benchmark uses."""
        return self.wordings(*self.values_of(seed))[0]


MINI_FLUX = Recipe(
    name="mini-flux",
    folder=afcache.mini_flux_folder(),
    image_size=data.IMAGE_SIZE,
    sizes=(10, 2),
    wordings=data.prompts_for,
    values_of=data.values_of,
    source=data.Source,
    features=data.features,
    transformer={
        "num_layers": 4,
        "num_single_layers": 8,
        "attention_head_dim": 32,
        "num_attention_heads": 3,
        "axes_dims_rope": (4, 14, 14),
    },
)
STROKES = Recipe(
    name="strokes",
    folder=_FOLDER / "strokes",
    image_size=stroke_images.IMAGE_SIZE,
    sizes=(10, 4, 2),
    wordings=stroke_images.prompts_for,
    values_of=stroke_images.values_of,
    source=stroke_images.Source,
    features=stroke_images.features,
    transformer={
        "num_layers": 2,
        "num_single_layers": 10,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "axes_dims_rope": (4, 14, 14),
    },
    vae_channels=(16, 32),
)
TEXTURES = Recipe(
    name="textures",
    folder=_FOLDER / "textures",
    image_size=texture_images.IMAGE_SIZE,
    sizes=(10, 2),
    wordings=texture_images.prompts_for,
    values_of=texture_images.values_of,
    source=texture_images.Source,
    features=texture_images.features,
    judge=lambda: make_pipeline(StandardScaler(), SVC(C=10, gamma="scale")),
    transformer={
        "num_layers": 6,
        "num_single_layers": 4,
        "attention_head_dim": 48,
        "num_attention_heads": 2,
        "axes_dims_rope": (8, 20, 20),
    },
    vae_channels=(16, 32),
)
RECIPES = {recipe.name: recipe for recipe in (MINI_FLUX, STROKES, TEXTURES)}
