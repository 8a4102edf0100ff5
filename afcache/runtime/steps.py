"""The steps of a bound transformer: what is compiled for each kind of trajectory, and how a call of it is made."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afcache.functional import forecast
from afcache.functional.initial import empty_state, shape_of
from afcache.functional.model import Sizes, model_of
from afcache.functional.ranks.step import Layout
from afcache.functional.state import CacheState
from afcache.functional.step import HistoryWriter
from afcache.models.family import Family
from afcache.parallel.groups import ParallelContext
from afcache.runtime.compiled import CompiledStep, CompileOptions, cached_step, full_step, given_step
from afcache.runtime.controls import Controls
from afcache.runtime.host import Host
from afcache.runtime.weights import Weights
from afcache.settings.config import CacheConfig


class Steps:
    """Compiles a step when it is first asked for.

    Args:
        transformer: owner of the weights.
        family: its family.
        config: settings.
        options: how to compile.
        compiler: torch.compile.
        layout: of the ranks that draw together; None draws alone.
        weights: of the transformer.

    """

    def __init__(
        self,
        transformer: Any,
        family: Family,
        config: CacheConfig,
        options: CompileOptions,
        compiler: Callable[..., Callable[..., Any]],
        *,
        layout: Layout | None,
        weights: Weights,
    ) -> None:
        self._transformer = transformer
        self._family = family
        self._config = config
        self._options = options
        self._compiler = compiler
        self._layout = layout
        self._weights = weights
        self._steps: dict[tuple[bool, Any, bool], CompiledStep] = {}
        self._around_host: dict[tuple[bool, bool], CompiledStep] = {}

    @property
    def sizes(self) -> Sizes:
        """Of the transformer."""
        return self._family.architecture.sizes(self._transformer)

    def get(self, corrects: bool, kernel_name: Any) -> CompiledStep:
        """The forward for a scheduler's kind of step, an attention backend and the present kind of weights.

        Args:
            corrects: whether the catch-up correction holds.
            kernel_name: of the attention backend.

        """
        key = (corrects, kernel_name, self._weights.has_subclasses)
        if key not in self._steps:
            self._steps[key] = self._build(corrects)
        return self._steps[key]

    def around_host(self, corrects: bool, *, is_computed: bool) -> CompiledStep:
        """What is around the host's own forward at a computed step, or the whole of a cached one."""
        key = (corrects, is_computed)
        if key not in self._around_host:
            config = dataclasses.replace(self._config, correction=corrects)
            step = given_step(self.sizes, config, history_writer(self._options), is_computed=is_computed)
            self._around_host[key] = CompiledStep(step, self._compiler, self._options)
        return self._around_host[key]

    def traceable(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block weights are shown as one graph can take them."""
        is_traced = self._options.enabled and not self._options.keeps_host
        return self._weights.traceable() if is_traced else contextlib.nullcontext()

    def _build(self, corrects: bool) -> CompiledStep:
        kernel = self._family.attention_kernel(self._transformer)
        model = model_of(self._transformer, self._family.architecture, kernel)
        config = dataclasses.replace(self._config, correction=corrects)
        options = dataclasses.replace(self._options, opens_subclasses=self._weights.has_subclasses)
        if not config.rule.is_cached:
            return CompiledStep(full_step(model, self._layout), self._compiler, options)
        # Hosts' rotary embeddings may be complex, and beside complex numbers inductor takes no branch that writes (torch 2.13).
        is_traced_host = options.enabled and self._family.dynamic is False
        writer = None if is_traced_host else history_writer(self._options)
        step = cached_step(model, self._layout, config, writer)
        return CompiledStep(step, self._compiler, options)


class Bound(NamedTuple):
    """What all images of a bound transformer share.

    Attributes:
        family: of the transformer.
        config: settings.
        parallel: the processes that draw together; None draws alone.
        steps: the compiled steps.
        weights: what may change about the transformer's weights.
        controls: `() -> Controls`: what ControlNets were called with last.
        host: runs the transformer's own forward at computed steps; None where ours stands for it.

    """

    family: Family
    config: CacheConfig
    parallel: ParallelContext | None
    steps: Steps
    weights: Weights
    controls: Callable[[], Controls]
    host: Host | None = None


def empty_states(
    bound: Bound, latents: torch.Size, prefix_length: int, dtype: torch.dtype, *, device: torch.device, count: int
) -> tuple[CacheState, ...]:
    """Of guidance branches on this rank: of its share of the tokens, or, where outputs are forecast, of the whole.

    Args:
        bound: what all images share.
        latents: shape of a call's.
        prefix_length: tokens that the blocks see before the image's.
        dtype, device: of the latents.
        count: how many branches.

    """
    config, parallel = bound.config, bound.parallel
    shards = 1 if parallel is None or config.forecasts_output else parallel.layout.sequence.whole.size
    shape = shape_of(bound.steps.sizes, latents, prefix_length, config=config)._replace(shards=shards)
    return tuple(empty_state(shape, config=config, dtype=dtype, device=device) for _ in range(count))


def write_newest(history: Tensor, newest: Tensor, refresh: Tensor) -> None:
    """Shift `newest` into the history's own memory: the `HistoryWriter` of a runtime, which owns its states.

    Cached steps then touch the history by reading it once.
    """
    history.copy_(forecast.push(history, newest, refresh))


def history_writer(options: CompileOptions) -> HistoryWriter | None:
    """How the history is updated: in place, or, where that cannot or should not be, as a fresh value (None).

    Compiled with dynamic shapes, a branch that writes specialises on every size (torch 2.13), so that each new resolution
    would be one more graph; a copy of the history costs little (`python -m bench.overhead parts`).
    """
    if not options.enabled:
        return write_newest
    # A state that lives in CUDA-graph memory is cloned after each call: writing into it would be lost.
    return write_newest if options.dynamic is False and not options.uses_cuda_graphs else None
