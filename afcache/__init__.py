"""AFCache: an error-controlled feature cache for diffusion transformers, as pure functions over an immutable state.

import afcache

pipe = afcache.compile_pipeline(pipe)
image = pipe("a cat holding a sign", num_inference_steps=28).images[0]
print(afcache.report(pipe))
afcache.restore_pipeline(pipe)
"""

import importlib
from typing import TYPE_CHECKING, Any

from afcache._version import __version__

if TYPE_CHECKING:
    from afcache.assets import mini_flux_folder, mini_wan_folder, recommended_settings
    from afcache.assets.pipeline import load_mini_flux, load_mini_wan
    from afcache.calibration.clips import ClipQuality, clip_quality
    from afcache.calibration.magnitudes import calibrate_magnitudes, measure_noise
    from afcache.calibration.metrics import psnr, ssim
    from afcache.calibration.tolerance import calibrate
    from afcache.functional.samples import move_samples, stack_samples, stack_schedules, take_samples
    from afcache.functional.state import CacheState
    from afcache.models.flux1.inputs import FluxInputs
    from afcache.parallel.config import ParallelConfig
    from afcache.pipeline import compile_pipeline, restore_pipeline, uncached, using
    from afcache.reports.records import report
    from afcache.reports.summary import Report
    from afcache.sampling.checkpoint import load_checkpoint, save_checkpoint
    from afcache.sampling.export import export_step
    from afcache.sampling.loop import denoise
    from afcache.sampling.primitives import cached_forward, check_state, denoising_step, init_state
    from afcache.sampling.result import Denoised
    from afcache.serving.batcher import Batcher
    from afcache.serving.handle import BusyError
    from afcache.settings.config import CacheConfig, Layerwise
    from afcache.settings.policies import POLICIES, policy
    from afcache.settings.presets import PRESETS

# Imported on first use: diffusers takes seconds to import, and `afcache --help` needs none of it.
_HOMES = {
    "POLICIES": "settings.policies",
    "PRESETS": "settings.presets",
    "Batcher": "serving.batcher",
    "BusyError": "serving.handle",
    "CacheConfig": "settings.config",
    "CacheState": "functional.state",
    "ClipQuality": "calibration.clips",
    "Denoised": "sampling.result",
    "FluxInputs": "models.flux1.inputs",
    "Layerwise": "settings.config",
    "ParallelConfig": "parallel.config",
    "Report": "reports.summary",
    "calibrate": "calibration.tolerance",
    "calibrate_magnitudes": "calibration.magnitudes",
    "cached_forward": "sampling.primitives",
    "check_state": "sampling.primitives",
    "clip_quality": "calibration.clips",
    "compile_pipeline": "pipeline",
    "denoise": "sampling.loop",
    "denoising_step": "sampling.primitives",
    "export_step": "sampling.export",
    "init_state": "sampling.primitives",
    "load_checkpoint": "sampling.checkpoint",
    "load_mini_flux": "assets.pipeline",
    "load_mini_wan": "assets.pipeline",
    "measure_noise": "calibration.magnitudes",
    "mini_flux_folder": "assets",
    "mini_wan_folder": "assets",
    "move_samples": "functional.samples",
    "policy": "settings.policies",
    "psnr": "calibration.metrics",
    "recommended_settings": "assets",
    "report": "reports.records",
    "restore_pipeline": "pipeline",
    "save_checkpoint": "sampling.checkpoint",
    "ssim": "calibration.metrics",
    "stack_samples": "functional.samples",
    "stack_schedules": "functional.samples",
    "take_samples": "functional.samples",
    "uncached": "pipeline",
    "using": "pipeline",
}

__all__ = [
    "POLICIES",
    "PRESETS",
    "Batcher",
    "BusyError",
    "CacheConfig",
    "CacheState",
    "ClipQuality",
    "Denoised",
    "FluxInputs",
    "Layerwise",
    "ParallelConfig",
    "Report",
    "__version__",
    "cached_forward",
    "calibrate",
    "calibrate_magnitudes",
    "check_state",
    "clip_quality",
    "compile_pipeline",
    "denoise",
    "denoising_step",
    "export_step",
    "init_state",
    "load_checkpoint",
    "load_mini_flux",
    "load_mini_wan",
    "measure_noise",
    "mini_flux_folder",
    "mini_wan_folder",
    "move_samples",
    "policy",
    "psnr",
    "recommended_settings",
    "report",
    "restore_pipeline",
    "save_checkpoint",
    "ssim",
    "stack_samples",
    "stack_schedules",
    "take_samples",
    "uncached",
    "using",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'afcache' has no attribute {name!r}; it offers {', '.join(__all__)}.")
    return getattr(importlib.import_module(f"afcache.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
