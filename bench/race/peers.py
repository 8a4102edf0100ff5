"""The caches of other libraries, each as its own documentation sets it up."""

import ast
import contextlib
import io
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from bench.race.contender import Contender, Force, blocks_of, compile_whole
from bench.race.subjects import Task


def peers() -> list[Contender]:
    """All of them, in the order of tables."""
    return [*_cache_dit(), *_diffusers(), *_diffusers_of_videos(), *_para_attention()]


class _Knobs(NamedTuple):
    """cache-dit's: threshold, most cached steps in a row, warmup steps."""

    threshold: float
    in_a_row: int
    warmup: int


# Its FLUX documentation: first 1 block, last 0, thresholds 0.12 to 0.24, 3 to 6 cached steps in a row. Then bolder.
_DOCUMENTED = (_Knobs(0.12, 3, 4), _Knobs(0.24, 4, 4))
_BOLD = (_Knobs(0.4, 6, 3), _Knobs(0.8, 8, 2))
# What TaylorSeer caches unless it is lite: its own choice, and Wan's attn1 and attn2, which that leaves out.
_ATTENTIONS = [r"((single_)?transformer_)?blocks\.\d+\.attn\d?"]


def _cache_dit() -> list[Contender]:
    def configure(pipe: Any, *, uses_taylor: bool, **settings: Any) -> None:
        import cache_dit
        from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig

        calibrator = TaylorSeerCalibratorConfig(taylorseer_order=1) if uses_taylor else None
        config = DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, **settings)
        cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)

    def enable(pipe: Any, task: Task, *, uses_taylor: bool, knobs: _Knobs) -> None:
        del task
        settings = {
            "residual_diff_threshold": knobs.threshold,
            "max_continuous_cached_steps": knobs.in_a_row,
            "max_warmup_steps": knobs.warmup,
        }
        configure(pipe, uses_taylor=uses_taylor, **settings)

    def force(pipe: Any, pattern: str, *, uses_taylor: bool) -> None:
        mask = [int(kind == "F") for kind in pattern]
        configure(
            pipe, uses_taylor=uses_taylor, steps_computation_mask=mask, steps_computation_policy="static", max_warmup_steps=1
        )

    def compile_as_documented(pipe: Any, task: Task) -> None:
        import cache_dit

        cache_dit.set_compile_configs()
        compile_whole(pipe, task)

    return [
        Contender(
            f"cache-dit{' + TaylorSeer' if uses_taylor else ''} {knobs.threshold:g}" + (", compiled" if is_compiled else ""),
            "cache-dit + TaylorSeer" if uses_taylor else "cache-dit",
            "peer",
            is_compiled,
            partial(enable, uses_taylor=uses_taylor, knobs=knobs),
            compile_as_documented if is_compiled else None,
            partial(force, uses_taylor=uses_taylor),
            module="cache_dit",
        )
        for is_compiled in (False, True)
        for uses_taylor in (False, True)
        for knobs in (*_DOCUMENTED, *_BOLD)
    ]


def _diffusers() -> list[Contender]:
    def first_block(pipe: Any, task: Task, *, knob: float) -> None:
        from diffusers import FirstBlockCacheConfig

        del task
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=knob))

    def force_first_block(pipe: Any, pattern: str) -> None:
        """No refresh can be asked for, but the threshold can be changed before every step."""
        from diffusers import FirstBlockCacheConfig

        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        hook = blocks_of(pipe.transformer)[0]._diffusers_hook.get_hook("fbc_leader_block_hook")
        _before_each_step(pipe, lambda index: setattr(hook, "threshold", -1.0 if pattern[index] == "F" else float("inf")))

    def taylorseer(pipe: Any, task: Task, *, knob: tuple[int, int], is_lite: bool) -> None:
        from diffusers import TaylorSeerCacheConfig

        del task
        interval, warmup = knob
        config = TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=warmup,
            taylor_factors_dtype=torch.float32,
            use_lite_mode=is_lite,
            cache_identifiers=None if is_lite else _ATTENTIONS,
        )
        pipe.transformer.enable_cache(config)

    def magcache(pipe: Any, task: Task, *, knob: tuple[float, int]) -> None:
        from diffusers import MagCacheConfig

        threshold, in_a_row = knob
        ratios = list(task.mag_ratios)
        config = MagCacheConfig(threshold=threshold, max_skip_steps=in_a_row, num_inference_steps=task.steps, mag_ratios=ratios)
        pipe.transformer.enable_cache(config)

    def force_magcache(pipe: Any, pattern: str) -> None:
        """Ratios of 1 add no error, infinite ones too much."""
        from diffusers import MagCacheConfig

        ratios = [float("inf") if kind == "F" else 1.0 for kind in pattern]
        config = MagCacheConfig(
            threshold=1.0, max_skip_steps=1000, num_inference_steps=len(pattern), mag_ratios=ratios, retention_ratio=0.0
        )
        pipe.transformer.enable_cache(config)

    def intervals(*knobs: tuple[int, int]) -> list[tuple[str, Any]]:
        """Three first steps are diffusers' own choice; two are better here."""
        return [(f"every {n}" + (f" after {w}" if w != 3 else ""), (n, w)) for n, w in knobs]

    lite = intervals((3, 2), (3, 3), (4, 2), (4, 3), (5, 2), (5, 3), (6, 3))
    rules: list[tuple[str, Any, Force | None, list[tuple[str, Any]]]] = [
        ("diffusers FirstBlockCache", first_block, force_first_block, [(f"{t:g}", t) for t in (0.05, 0.12, 0.24)]),
        ("diffusers TaylorSeer lite", partial(taylorseer, is_lite=True), None, lite),
        ("diffusers TaylorSeer", partial(taylorseer, is_lite=False), None, intervals((3, 3), (5, 3))),
        (
            "diffusers MagCache",
            magcache,
            force_magcache,
            [(f"{t:g}", (t, k)) for t, k in ((0.06, 3), (0.12, 4), (0.24, 5))],
        ),
    ]
    return [
        Contender(
            f"{family} {label}" + (", compiled" if is_compiled else ""),
            family,
            "peer",
            is_compiled,
            partial(enable, knob=knob),
            compile_whole if is_compiled else None,
            force,
        )
        for is_compiled in (False, True)
        for family, enable, force, knobs in rules
        for label, knob in knobs
    ]


def _diffusers_of_videos() -> list[Contender]:
    """Caches of attention, as their examples set them up; they count calls, and cannot be told when to refresh."""

    def pyramid(pipe: Any, task: Task) -> None:
        from diffusers import PyramidAttentionBroadcastConfig

        del task
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 800),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
        pipe.transformer.enable_cache(config)

    def faster(pipe: Any, task: Task) -> None:
        """Its guidance needs both branches in one batch; without, it takes the model for a distilled one."""
        from diffusers import FasterCacheConfig

        del task
        config = FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 681),
            attention_weight_callback=lambda _: 0.3,
            current_timestep_callback=lambda: pipe.current_timestep,
            is_guidance_distilled=True,
        )
        pipe.transformer.enable_cache(config)

    rules = (("diffusers PyramidAttentionBroadcast", pyramid), ("diffusers FasterCache", faster))
    return [
        Contender(
            f"{family} 2" + (", compiled" if is_compiled else ""),
            family,
            "peer",
            is_compiled,
            enable,
            compile_whole if is_compiled else None,
            only="wan",
        )
        for is_compiled in (False, True)
        for family, enable in rules
    ]


def _para_attention() -> list[Contender]:
    def enable(pipe: Any, task: Task) -> None:
        from para_attn.first_block_cache.diffusers_adapters import apply_cache_on_pipe

        del task
        apply_cache_on_pipe(pipe, residual_diff_threshold=0.12)

    def force(pipe: Any, pattern: str) -> None:
        """By the threshold, as FirstBlockCache; it lies in a context that is made for each image."""
        from para_attn.first_block_cache.diffusers_adapters import apply_cache_on_pipe
        from para_attn.first_block_cache.utils import get_current_cache_context

        def tell(index: int) -> None:
            context: Any = get_current_cache_context()
            context.residual_diff_threshold = -1.0 if pattern[index] == "F" else float("inf")

        apply_cache_on_pipe(pipe)
        _before_each_step(pipe, tell)

    return [
        Contender(
            "ParaAttention 0.12" + (", compiled" if is_compiled else ""),
            "ParaAttention",
            "peer",
            is_compiled,
            enable,
            compile_whole if is_compiled else None,
            force,
            module="para_attn",
        )
        for is_compiled in (False, True)
    ]


def calibrate_magcache(pipe: Any, steps: int, sample: Callable[[], Any]) -> tuple[float, ...]:
    """MagCache's ratios by diffusers' own calibration mode, which prints them at the end of an image."""
    from diffusers import MagCacheConfig

    printed = io.StringIO()
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps))
    try:
        with contextlib.redirect_stdout(printed):
            sample()
    finally:
        pipe.transformer.disable_cache()
    found = re.findall(r"\[[\d., e-]+\]", printed.getvalue())
    if not found:
        raise RuntimeError(f"MagCache's calibration printed no ratios, but {printed.getvalue()!r}.")
    return tuple(ast.literal_eval(found[-1]))


def _before_each_step(pipe: Any, action: Callable[[int], None]) -> None:
    """Call `action` with the index of the step that comes, by way of the pipeline's scheduler."""
    scheduler, step, set_begin_index = pipe.scheduler, pipe.scheduler.step, pipe.scheduler.set_begin_index
    index = 0

    def begin(*args: Any, **kwargs: Any) -> Any:
        nonlocal index
        index = 0
        action(0)
        return set_begin_index(*args, **kwargs)

    def advance(*args: Any, **kwargs: Any) -> Any:
        nonlocal index
        result = step(*args, **kwargs)
        index += 1
        if index < len(scheduler.timesteps):
            action(index)
        return result

    scheduler.set_begin_index, scheduler.step = begin, advance
