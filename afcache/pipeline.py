"""Binding our forward to a diffusers pipeline, and changing what it does there. The only torch.compile is here."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch

from afcache.models.families import check_pipeline, draws_videos, family_of, transformers_of
from afcache.models.family import Family
from afcache.parallel.config import ParallelConfig
from afcache.parallel.groups import ParallelContext, check_device, check_heads, connect
from afcache.runtime.binding import bind, bound_runtime, check_bindable, release, require_runtimes, set_aside
from afcache.runtime.compiled import CompileOptions
from afcache.runtime.controls import unwatch
from afcache.runtime.host import sharing_of
from afcache.runtime.modes import choose_mode
from afcache.runtime.runtime import Runtime, check_model
from afcache.runtime.scheduler import check_scheduler
from afcache.settings.changes import change
from afcache.settings.config import CacheConfig
from afcache.settings.presets import resolve_config

_MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
PipelineT = TypeVar("PipelineT")


def compile_pipeline(
    pipe: PipelineT,
    config: CacheConfig | None = None,
    *,
    tolerance: float | None = None,
    preset: str | None = None,
    compile: bool | Literal["step", "blocks"] = True,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
    parallel: ParallelConfig | None = None,
    decide_ahead: bool = False,
) -> PipelineT:
    """Make a pipeline sample faster, in place.

    Our forward is bound to the transformer instance; no class is changed, and saving, LoRA, offload, `from_pipe` and
    `deepcopy` work as before. Calling it again replaces the settings. Every pipeline that shares the transformer is cached,
    whatever its class; one that has a scheduler of its own must be passed here as well. Threads that draw at once need a
    pipeline and a scheduler each.

    Args:
        pipe: a pipeline of a family that is cached (docs/compatibility.md), with a transformer.
        config: complete settings; excludes `tolerance` and `preset`.
        tolerance: error budget between refreshes; 0 computes every step.
        preset: "quality", "balanced" (default) or "fast". Under a preset or a tolerance a pipeline that draws videos computes
            its first three steps (others two) and weighs late errors down no longer; of several that share a transformer the
            one that was passed last decides.
        compile: "step" (True): the whole step is one graph, the model's blocks included. "blocks": computed steps are the
            transformer's own forward, whatever has been done to it (`transformer.compile()`, `compile_repeated_blocks`,
            offload, quantisation, attention processors, `enable_parallelism`); if nothing of it is compiled, its
            repeated blocks will be; a cached step is one small graph, and decisions are made ahead. It needs a config whose
            target is "noise" or "velocity". False: nothing is compiled.
        backend: torch.compile's backend.
        mode: torch.compile's mode.
        dynamic: torch.compile's dynamic shapes; None lets a second shape make them dynamic, False compiles each shape by
            itself and updates the history in place; so does None where ranks share a sequence. A model that runs its own
            forward in the step's graph is compiled for each shape, and its history is a fresh value.
        parallel: how to share the work among the processes that torchrun started; on all of them the pipeline is called with
            the same arguments and returns the same images. Every process holds all weights.
        decide_ahead: read decisions once a refresh, for all steps up to the next one; a step then reads one flag before it is
            launched, whether its latents are where the last one led, and its branch waits for nothing.
            Images are the same. Not together with `parallel`, gates ("teacache", "dbcache") or groups.

    Returns:
        the same pipeline.

    Raises:
        NotImplementedError: the pipeline, its transformer or its scheduler is not supported; the message says what is.
        ValueError: conflicting or invalid settings, more groups or blocks than the transformer has, or no transformer.
        RuntimeError: `parallel` does not fit the processes that run, or xfuser cannot be imported.
    Cost:
        Memory: order + 2 velocities in float32 per guidance branch (1 MiB each at 1024 x 1024 pixels), and one more under
        solvers that mix several outputs; where residuals are forecast, as many residuals of the image tokens (24 MiB each at
        width 3072 and bfloat16); as many for each group of a `Layerwise` config, and its "attention" strategy keeps one per
        block. The first image also pays for compilation.

    """
    if parallel is not None and not isinstance(parallel, ParallelConfig):
        raise TypeError(f"parallel must be an afcache.ParallelConfig or None, got {parallel!r}.")
    settings = resolve_config(config, tolerance=tolerance, preset=preset, draws_videos=draws_videos(pipe))
    _check_compile(compile, settings, parallel)
    check_pipeline(pipe)
    options = CompileOptions(enabled=bool(compile), backend=backend, mode=mode, dynamic=dynamic, keeps_host=compile == "blocks")
    # Shares of a sequence have sizes that torch.cond cannot take as symbols (torch 2.13).
    if dynamic is None and parallel is not None and parallel.shares_sequence:
        options = dataclasses.replace(options, dynamic=False)
    with contextlib.ExitStack() as stack:
        bound: list[tuple[Any, Runtime]] = []
        for transformer in transformers_of(pipe):
            stack.enter_context(set_aside(transformer))
            family = family_of(transformer)
            own = settings
            if config is None and family.target is not None:
                own = dataclasses.replace(settings, target=family.target)
            mine = choose_mode(options, transformer, family, pipe, asked=compile, forecasts_output=own.forecasts_output)
            if mine.dynamic is None and not mine.keeps_host:
                mine = dataclasses.replace(mine, dynamic=family.dynamic)
            check_model(transformer, family, mine)
            family.checks.config(transformer, own)
            scheduler: Any = pipe.scheduler  # pyright: ignore[reportAttributeAccessIssue]
            check_scheduler(scheduler, forecasts=own.rule.is_cached, is_flow=family.is_flow)
            _check_foresight(decide_ahead, own, parallel)
            _check_options(mine)
            context = None if parallel is None else _connect(parallel, transformer, family)
            runtime = Runtime(transformer, own, mine, torch.compile, context, decides_ahead=decide_ahead)
            check_bindable(transformer, runtime)
            previous = bound_runtime(transformer)
            for served in [*(previous.pipelines.alive() if previous is not None else []), pipe]:
                runtime.pipelines.add(served)
            bound.append((transformer, runtime))
        for transformer, runtime in bound:
            bind(transformer, runtime)
    return pipe


def restore_pipeline(pipe: PipelineT) -> PipelineT:
    """Undo `compile_pipeline`: the transformer runs its own forward again, for every pipeline that shares it.

    Raises:
        ValueError: the pipeline was not compiled by `compile_pipeline`.

    """
    for runtime in require_runtimes(pipe):
        unwatch(runtime.pipelines.alive())
    for transformer in transformers_of(pipe):
        if bound_runtime(transformer) is not None:
            release(transformer)
    return pipe


@contextlib.contextmanager
def uncached(pipe: Any) -> Iterator[None]:
    """Run the transformer's own forward inside the block; the compiled one, its settings and its report stay.

    What `transformer.compile()` had made before `compile="blocks"` runs uncompiled here.

    Raises:
        ValueError: the pipeline was not compiled by `compile_pipeline`.

    """
    runtimes = require_runtimes(pipe)
    before = [runtime.is_bypassed for runtime in runtimes]
    try:
        for runtime in runtimes:
            runtime.is_bypassed = True
        yield
    finally:
        for runtime, its in zip(runtimes, before, strict=True):
            runtime.is_bypassed = its


@contextlib.contextmanager
def using(
    pipe: Any,
    config: CacheConfig | None = None,
    *,
    tolerance: float | Sequence[float] | None = None,
    preset: str | None = None,
) -> Iterator[None]:
    """Draw with another tolerance inside the block, and with what follows it; nothing is compiled again.

    with afcache.using(pipe, tolerance=0.03):
        image = pipe("a cat holding a sign").images[0]
    with afcache.using(pipe, tolerance=[0.008, 0.03]):
        images = pipe(["a cat holding a sign", "a red bicycle"]).images

    `max_growth` and `damping` follow the tolerance if they are what the presets have at the pipeline's own tolerance; if a
    config of yours has others, they stay. Blocks nest, the inner one counts. An image that is under way when a block begins or
    ends keeps its settings until its end. What `compile_pipeline` sets inside the block holds at once.

    Args:
        pipe: a pipeline that was compiled; the block is for all pipelines that share its transformer.
        config: settings that differ from those that it was compiled with in `tolerance`, `max_growth` and `damping` alone.
        tolerance: error budget between refreshes, >= 0; or one for each image of the batch, `[batch]`, however many guidance
            branches there are.
        preset: "quality", "balanced" or "fast": the name of a tolerance.

    Raises:
        ValueError: the pipeline was not compiled by `compile_pipeline`, or has a policy without error control; not exactly one
            of the three is given; a value is out of its range; a config would need another graph. From inside the block, where
            an image begins: as many tolerances as the batch has images are asked for.
        TypeError: a value is of the wrong kind.
    Cost:
        none: they are inputs of every step anyway. Like the pipeline, for one thread at a time.

    """
    runtimes = require_runtimes(pipe)
    changed = [change(runtime.config, config, tolerance=tolerance, preset=preset) for runtime in runtimes]
    before = [runtime.in_use for runtime in runtimes]
    try:
        for runtime, its in zip(runtimes, changed, strict=True):
            runtime.in_use = its
        yield
    finally:
        for runtime, its in zip(runtimes, before, strict=True):
            runtime.in_use = its


def _connect(parallel: ParallelConfig, transformer: Any, family: Family) -> ParallelContext:
    if family.calls.of_ranks is None:
        raise NotImplementedError(
            f"parallel={parallel!r} is not supported with {family.name}: ranks share out a forward that we know. Leave "
            "parallel out, and let diffusers share the model out before: transformer.enable_parallelism(...)."
        )
    if sharing_of(transformer) is not None:
        raise ValueError(
            f"parallel must be None, got {parallel!r}: transformer.enable_parallelism has shared the model out already. Leave "
            "parallel out, or load the model afresh."
        )
    check_heads(parallel, family.architecture.sizes(transformer).heads)
    check_device(transformer.device)
    if parallel.ring_degree > 1 and family.attention_backend(transformer) is not None:
        raise ValueError(
            f"ring_degree must be 1 under an attention backend, got {parallel.ring_degree}: a ring merges softmaxes, which "
            "backends do not return. Use ulysses_degree, or call transformer.reset_attention_backend()."
        )
    return connect(parallel)


def _check_compile(compile: object, config: CacheConfig, parallel: ParallelConfig | None) -> None:
    """Raise unless `compile` is known, and the settings leave the model's inside alone where its own forward runs."""
    if not isinstance(compile, bool) and compile not in ("step", "blocks"):
        raise ValueError(f"compile must be True, False, 'step' or 'blocks', got {compile!r}. True means 'step'.")
    if compile != "blocks":
        return
    if not config.forecasts_output:
        raise ValueError(
            f"compile='blocks' needs a config whose target is 'noise' or 'velocity', got {config.target!r}: a residual can be "
            "forecast only by the forward that computes it. Leave config out, or pass one that has such a target."
        )
    if parallel is not None:
        raise NotImplementedError(
            f"compile='blocks' cannot be combined with parallel={parallel!r}: ranks share out our forward. Leave parallel "
            "out, and let diffusers share the model out before: transformer.enable_parallelism(...)."
        )


def _check_foresight(decide_ahead: bool, config: CacheConfig, parallel: ParallelConfig | None) -> None:
    """Refuse to decide ahead where a step's decision needs the step itself, or other ranks."""
    if not isinstance(decide_ahead, bool):
        raise TypeError(f"decide_ahead must be True or False, got {decide_ahead!r}.")
    if not decide_ahead:
        return
    if parallel is not None:
        raise NotImplementedError(
            f"decide_ahead=True cannot be combined with parallel={parallel!r} yet: ranks agree within the step. Leave it out."
        )
    if config.rule.is_gated or config.layerwise is not None:
        what = "layerwise" if config.layerwise is not None else f"policy {config.policy!r}"
        raise ValueError(
            f"decide_ahead must be False under {what}, got True: it decides by what it sees of each step. Leave it out, or use "
            "policy 'adaptive', 'fixed', 'growing', 'magcache' or 'planned' without groups."
        )


def _check_options(options: CompileOptions) -> None:
    """Raise at once for a backend or mode that torch.compile would refuse at the first image."""
    if options.mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, _MODES))}, got {options.mode!r}.")
    if options.enabled and isinstance(options.backend, str):
        known = torch._dynamo.list_backends(exclude_tags=())
        if options.backend not in known:
            raise ValueError(f"backend must be a callable or one of {', '.join(known)}, got {options.backend!r}.")
