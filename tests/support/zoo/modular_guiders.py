"""Guiders of diffusers, each in a tiny modular pipeline: Wan's, or Qwen-Image's where diffusers 0.42 fails with Wan's.

The smoothed energy one calls the model a third time with nothing smoothed, as it counts no calls.
"""

from functools import partial
from typing import Any

from diffusers import guiders
from diffusers.hooks import LayerSkipConfig

from tests.support.zoo.kind import Kind
from tests.support.zoo.modular import as_given
from tests.support.zoo.modular_image import make_qwen, masked
from tests.support.zoo.modular_video import make_wan, wan_text


def _early(prefix: str) -> dict[str, Any]:
    """What is perturbed is so in the first half."""
    return {"guidance_scale": 4.0, f"{prefix}_start": 0.0, f"{prefix}_stop": 0.5}


def _auto() -> Any:
    return guiders.AutoGuidance(guidance_scale=3.0, auto_guidance_config=LayerSkipConfig([1], fqn="blocks"))


def _skipped() -> Any:
    return guiders.SkipLayerGuidance(**_early("skip_layer_guidance"), skip_layer_config=LayerSkipConfig([1], fqn="blocks"))


def _perturbed() -> Any:
    parts = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
    config = LayerSkipConfig([1], "transformer_blocks", **parts)
    return guiders.PerturbedAttentionGuidance(**_early("perturbed_guidance"), perturbed_guidance_config=config)


WITH_WAN: dict[str, Any] = {
    "part of the time": partial(guiders.ClassifierFreeGuidance, guidance_scale=5.0, start=0.2, stop=0.8),
    "rescaled": partial(guiders.ClassifierFreeGuidance, guidance_scale=5.0, guidance_rescale=0.7),
    "original formula": partial(guiders.ClassifierFreeGuidance, guidance_scale=3.0, use_original_formulation=True),
    "adaptive projected": partial(
        guiders.AdaptiveProjectedGuidance, guidance_scale=5.0, adaptive_projected_guidance_momentum=-0.5
    ),
    "adaptive projected mix": partial(guiders.AdaptiveProjectedMixGuidance, adaptive_projected_guidance_start_step=3),
    "auto": _auto,
    "skipped layer": _skipped,
    "smoothed energy": partial(guiders.SmoothedEnergyGuidance, guidance_scale=5.0, seg_guidance_layers=[1]),
    "tangential": partial(guiders.TangentialClassifierFreeGuidance, guidance_scale=5.0),
    "zero star": partial(guiders.ClassifierFreeZeroStarGuidance, guidance_scale=5.0),
}
WITH_QWEN: dict[str, Any] = {
    "magnitude aware": partial(guiders.MagnitudeAwareGuidance, guidance_scale=5.0),
    "perturbed attention": _perturbed,
}


def _make(make: Any, guider: Any) -> Any:
    return make(guider())


def _kind(host: str, family: str, name: str, make: Any, arguments: Any) -> Kind:
    return Kind(f"{host} [{name}]", family, make, arguments, {}, latents=as_given)


KINDS = [
    _kind("WanModularPipeline", "Wan 2.1", name, partial(_make, make_wan, guider), wan_text)
    for name, guider in WITH_WAN.items()
]
KINDS += [
    _kind("QwenImageModularPipeline", "Qwen-Image", name, partial(_make, make_qwen, guider), masked)
    for name, guider in WITH_QWEN.items()
]
SKIPPED = {
    "FrequencyDecoupledGuidance": "ImportError: the `kornia` library on which it depends is not available",
    "MagnitudeAwareGuidance with Wan": "RuntimeError: linalg.matrix_norm: dim must be a 2-tuple. Got 1 2 3 4",
    "PerturbedAttentionGuidance with Wan": "ValueError: Model class WanAttnProcessor not registered.",
    "SkipLayerGuidance, AutoGuidance with Qwen-Image": "RuntimeError: tensor a (16) must match b (6): outputs swapped",
    "ClassifierFreeZeroStarGuidance with Qwen-Image": "its zeros are divided by their norm: nan",
}
