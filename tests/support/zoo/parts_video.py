"""What only pipelines of video and audio need: embeddings of prompts, clips, models of transformers."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from tests.support.zoo.kind import flat
from tests.support.zoo.parts import picture

# What Mochi's and Helios's pipelines warn of, for pytest.mark.filterwarnings.
HARMLESS = ("ignore:In CPU autocast:UserWarning", "ignore:__array_wrap__ must accept:DeprecationWarning")


def old_norms(model: Callable[..., Any]) -> Callable[..., Any]:
    """A model as `build` makes one, whose class still takes a function that torch wants replaced."""

    def make(**sizes: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return model(**sizes)

    return make


def of_config(model: Callable[[Any], Any], config: Callable[..., Any]) -> Callable[..., Any]:
    """A transformers model as `build` makes one: called with what its configuration is called with."""
    return lambda **sizes: model(config(**sizes))


def clip(width: int, height: int, frames: int, seed: int = 0) -> list[Image.Image]:
    """One picture that fades into another."""
    first, last = picture(width, height, seed), picture(width, height, seed + 1)
    return [Image.blend(first, last, frame / max(frames - 1, 1)) for frame in range(frames)]


def parts_of(result: Any) -> torch.Tensor:
    """All that a pipeline gives, video and audio, in one row."""
    return flat(list(result.values()))


def first_of(result: Any) -> torch.Tensor:
    """What a pipeline gives under a name that few others use."""
    return next(iter(result.values()))
