"""What a tiny pipeline of the zoo is, and how it is called."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


def flat(value: Any) -> torch.Tensor:
    """One tensor of what may be a pair of them."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.cat([flat(part).flatten() for part in value])


def first_of(result: Any) -> torch.Tensor:
    """The latents in a pipeline's output: its first field, whatever that is called."""
    return flat(result[0])


class Kind(NamedTuple):
    """A pipeline class with tiny random models, and how it is called.

    Attributes:
        name: unique; the pipeline's class, and a variant in brackets where one class has several.
        family: as users call it.
        make: a new pipeline each time, with the same weights each time.
        arguments: of a call, for prompt 0 or 1, without `generator` and the number of steps.
        guided: arguments that switch classifier-free guidance on, {} where the default has it, None if the pipeline has none.
        unguided: arguments that switch it off, or None.
        steps: how the number of steps is asked for.
        latents: what of the pipeline's result is the latents.

    """

    name: str
    family: str
    make: Callable[[], Any]
    arguments: Callable[[Any, int], dict[str, Any]]
    guided: dict[str, Any] | None = None
    unguided: dict[str, Any] | None = None
    steps: str = "num_inference_steps"
    latents: Callable[[Any], torch.Tensor] = first_of


def draw(pipe: Any, kind: Kind, seed: int = 0, steps: int = 6, prompt: int = 0, **options: Any) -> torch.Tensor:
    """The final latents of one call; `options` are arguments that come on top of the kind's."""
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    arguments = {**kind.arguments(pipe, prompt), kind.steps: steps, **options}
    with torch.no_grad():
        return kind.latents(pipe(**arguments, generator=torch.Generator().manual_seed(seed)))
