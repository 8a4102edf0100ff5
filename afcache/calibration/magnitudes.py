"""Measurements on a user's own model that some policies ask for."""

from collections.abc import Sequence
from typing import Any

import torch

from afcache.models.families import family_of
from afcache.pipeline import compile_pipeline, restore_pipeline
from afcache.runtime.binding import bound_runtime, require_runtime
from afcache.runtime.noise_floor import measure_noise_floor
from afcache.settings.config import CacheConfig


def calibrate_magnitudes(pipe: Any, prompts: Sequence[str], **options: Any) -> tuple[float, ...]:
    """Measure how the norm of the stack's residual changes from step to step: MagCache's calibration.

    import afcache

    ratios = afcache.calibrate_magnitudes(pipe, ["a cat holding a sign"], num_inference_steps=28)
    pipe = afcache.compile_pipeline(pipe, afcache.policy("magcache", magnitude_ratios=ratios))

    Every step is computed. With true CFG the prompt's branch is measured.

    Args:
        pipe: a pipeline that `compile_pipeline` would take, uncached.
        prompts: what to draw; the ratios are averaged.
        options: of the pipeline's call, e.g. `num_inference_steps`, `height`, `width`, `true_cfg_scale`.

    Returns:
        one ratio for each step, the mean over tokens of ||r_i|| / ||r_{i-1}||; the first is 1.

    Raises:
        ValueError: no prompt, or the pipeline is cached already.
    Reference:
        Ma et al., 2025, MagCache, arXiv 2506.09045, equation 3.

    """
    if "callback_on_step_end" in options:
        raise ValueError("callback_on_step_end cannot be given to calibrate_magnitudes: it measures by one of its own.")
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a list of at least one prompt, got {prompts!r}.")
    if bound_runtime(pipe.transformer) is not None:
        raise ValueError("pipe is cached already. Call afcache.restore_pipeline(pipe) first; calibration runs uncached.")
    runs: list[list[float]] = []
    compile_pipeline(pipe, CacheConfig(tolerance=0.0), compile=False)

    def measure(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        del timestep
        trajectory = require_runtime(pipe).last_trajectory(pipe)
        assert trajectory is not None
        newest, before = trajectory.present[0].states[0].history.to(torch.float32)
        ratio = newest.norm(dim=-1) / before.norm(dim=-1)
        runs[-1].append(1.0 if step == 0 else float(ratio.mean()))
        return tensors

    try:
        for prompt in prompts:
            runs.append([])
            pipe(prompt, callback_on_step_end=measure, **{"output_type": "latent", **options})
    finally:
        restore_pipeline(pipe)
    return tuple(sum(step) / len(runs) for step in zip(*runs, strict=True))


def measure_noise(pipe: Any) -> float:
    """Measure how much two evaluations of the transformer differ by rounding alone: a `CacheConfig(noise_floor=...)`.

    For quantised weights `compile_pipeline` does this by itself. Weights in int8 or float8 that compute in a higher precision
    add no noise; activations in int8 added 0.5 % on the model that ships, bfloat16 0.8 %.

    Args:
        pipe: a pipeline that `compile_pipeline` would take, cached or not.

    Returns:
        the relative difference, of velocities.

    Raises:
        NotImplementedError: the transformer is not supported.

    """
    transformer = pipe.transformer
    family = family_of(transformer)
    family.checks.transformer(transformer)
    return measure_noise_floor(transformer, family, dtype=transformer.dtype, device=transformer.device)
