"""Axis glossary, shape aliases, and the `typed` decorator.

| axis | meaning |
|---|---|
| `batch` | samples of one transformer call |
| `img_seq`, `txt_seq`, `seq` | image tokens, text tokens, both (text first) |
| `heads`, `head_dim`, `dim` | attention heads, their width, the model's width |
| `channels` | width of a latent token: what the transformer takes and returns |
| `nodes` | refreshes that the history remembers, newest first |
| `coarse` | text tokens, and image tokens pooled to 64 at most |
| `groups`, `blocks` | contiguous parts of the block stack, and its blocks |

This file and those that use `typed` do without `from __future__ import annotations`: the checker needs real objects.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from beartype import BeartypeConf, beartype
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
# As Python's own types have it, an int is a float: settings such as 2 for 2.0 are meant well.
_CHECKER = beartype(conf=BeartypeConf(is_pep484_tower=True))

# A module of the host library, used by its attribute names; `functional` imports no host library.
HostModule = Any

Features = Float[Tensor, "batch img_seq dim"]
ImagePrompts = Float[Tensor, "batch *image"]
TextFeatures = Float[Tensor, "batch txt_seq dim"]
Tokens = Float[Tensor, "batch seq dim"]
Vector = Float[Tensor, "batch dim"]
Summary = Float[Tensor, "batch coarse dim"]
AttentionMap = Float[Tensor, "batch query key"]
# Latents of any rank: tokens `[batch, img_seq, channels]`, images `[batch, channels, height, width]`, videos with an axis more.
Velocity = Float[Tensor, "batch *latent"]
Latents = Float[Tensor, "batch *latent"]
Sigmas = Float[Tensor, " levels"]
Kept = Float[Tensor, "batch *kept"]
History = Float[Tensor, "nodes batch *kept"]
Nodes = Float[Tensor, "nodes batch"]
Row = Float[Tensor, "nodes batch"]
PerSample = Float[Tensor, " batch"]
Counts = Int[Tensor, " batch"]
Flags = Bool[Tensor, " batch"]
Scalar = Float[Tensor, ""]
Index = Int[Tensor, ""]
Flag = Bool[Tensor, ""]
# A setting that enters a step as a tensor, and where the step stands: for all samples (0-d), or one for each.
Setting = Scalar | PerSample
Level = Scalar | PerSample
StepIndex = Index | Counts
Forced = Flag | Flags
# What the last outputs weigh in a solver's step, and what is known of each, the newest first.
Response = Float[Tensor, " window"] | Float[Tensor, "window batch"]
Window = Float[Tensor, "window batch"]
PerGroup = Float[Tensor, "groups batch"]
GroupCounts = Int[Tensor, "groups batch"]
GroupFlags = Bool[Tensor, "groups batch"]
GroupHistory = Float[Tensor, "groups batch img_seq dim"]
GroupHistories = Float[Tensor, "groups nodes batch seq dim"]
GroupNodes = Float[Tensor, "groups nodes batch"]
Summaries = Float[Tensor, "groups batch coarse dim"]
AttentionMaps = Float[Tensor, "groups batch coarse coarse"]
BlockOutputs = Float[Tensor, "blocks batch seq dim"]
Votes = Int[Tensor, "decisions ranks batch"]
Heads = Float[Tensor, "batch heads seq head_dim"]


_is_unchecked: ContextVar[bool] = ContextVar("_is_unchecked", default=False)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Call raw functions inside the block, for arguments like those that were checked before."""
    token = _is_unchecked.set(True)
    try:
        yield
    finally:
        _is_unchecked.reset(token)


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """Check shapes and types in eager mode; call the raw function under torch.compile, torch.export and `unchecked`.

    Checked functions do not trace, so the two are kept side by side.

    Raises:
        jaxtyping.TypeCheckError: an argument or the result does not fit its annotation (eager mode only).

    """
    checked = jaxtyped(typechecker=_CHECKER)(function)

    @functools.wraps(function)
    def dispatch(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or _is_unchecked.get():
            return function(*args, **kwargs)
        return checked(*args, **kwargs)

    return dispatch
