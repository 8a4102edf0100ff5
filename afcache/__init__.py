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
    from afcache.assets import load_mini_flux, mini_flux_folder
    from afcache.calibration import calibrate_magnitudes, measure_noise
    from afcache.checkpoint import load_checkpoint, save_checkpoint
    from afcache.config import PRESETS, CacheConfig, Layerwise
    from afcache.export import export_step
    from afcache.functional.step import cached_forward, denoising_step
    from afcache.initial import check_state, init_state
    from afcache.metrics import psnr, ssim
    from afcache.models.flux import FluxInputs
    from afcache.parallel import ParallelConfig
    from afcache.pipeline import compile_pipeline, restore_pipeline, uncached
    from afcache.policies import POLICIES, policy
    from afcache.reading import report
    from afcache.reporting import Report
    from afcache.sampling import Denoised, denoise
    from afcache.state import CacheState
    from afcache.targets import calibrate

# Imported on first use: diffusers takes seconds to import, and `afcache --help` needs none of it.
_HOMES = {
    "POLICIES": "policies",
    "PRESETS": "config",
    "CacheConfig": "config",
    "CacheState": "state",
    "Denoised": "sampling",
    "FluxInputs": "models.flux",
    "Layerwise": "config",
    "ParallelConfig": "parallel",
    "Report": "reporting",
    "calibrate": "targets",
    "calibrate_magnitudes": "calibration",
    "cached_forward": "functional.step",
    "check_state": "initial",
    "compile_pipeline": "pipeline",
    "denoise": "sampling",
    "denoising_step": "functional.step",
    "export_step": "export",
    "init_state": "initial",
    "load_checkpoint": "checkpoint",
    "load_mini_flux": "assets",
    "measure_noise": "calibration",
    "mini_flux_folder": "assets",
    "policy": "policies",
    "psnr": "metrics",
    "report": "reading",
    "restore_pipeline": "pipeline",
    "save_checkpoint": "checkpoint",
    "ssim": "metrics",
    "uncached": "pipeline",
}

__all__ = [
    "POLICIES",
    "PRESETS",
    "CacheConfig",
    "CacheState",
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
    "compile_pipeline",
    "denoise",
    "denoising_step",
    "export_step",
    "init_state",
    "load_checkpoint",
    "load_mini_flux",
    "measure_noise",
    "mini_flux_folder",
    "policy",
    "psnr",
    "report",
    "restore_pipeline",
    "save_checkpoint",
    "ssim",
    "uncached",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'afcache' has no attribute {name!r}; it offers {', '.join(__all__)}.")
    return getattr(importlib.import_module(f"afcache.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
