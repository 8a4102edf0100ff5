"""The families whose models run their own forward: one entry each."""

import functools
import importlib
from typing import Any

import torch

from afcache._typing import HostModule
from afcache.models.family import FROM_THE_END, IN_TIMESTEPS, Clock, Known
from afcache.models.hosted.conventions import Conventions
from afcache.models.hosted.cuts import (
    after_given_frames,
    after_references,
    before_references,
    before_variances,
    first_channels,
    first_channels_of_frames,
    frames_by_settings,
    listed_shapes,
    marked_frames,
)
from afcache.models.hosted.family import hosted
from afcache.models.hosted.packed import after_conditions, of_last_row, with_all_levels

_PACKED_WITH_REFERENCES = Conventions(cuts=before_references, depends="img_ids")
_CONTROL = ("controlnet_block_samples", "controlnet_single_block_samples", "block_controlnet_hidden_states")


def _never(_: HostModule) -> bool:
    return False


def _has_no_glyphs(transformer: HostModule) -> bool:
    return getattr(transformer.config, "text_embed_2_dim", None) is None


def _fills_keys(arguments: dict[str, Any]) -> bool:
    return arguments.get("kv_cache_mode") == "extract"


def _writes_keys(arguments: dict[str, Any]) -> bool:
    caches = arguments.get("kv_caches")
    return caches is not None and any(cache.mode == "write" for cache in caches.caches)


def _named(module: str, kind: str, sample: Any, audio_sample: Any) -> Any:
    """Outputs with names, in a class that diffusers exports nowhere, imported when it is asked for."""
    names = importlib.import_module(f"diffusers.models.transformers.{module}")
    return getattr(names, kind)(sample=sample, audio_sample=audio_sample)


def _pair(result: Any) -> Any:
    return result[0], result[1]


def _make_rope(transformer: Any) -> None:
    """Its tables are made at the first call, within a context that cannot be traced."""
    transformer.rope_embedder(torch.zeros(1, 3, dtype=torch.int64, device=transformer.device))


HOSTED: tuple[Known, ...] = (
    hosted(
        "Qwen-Image",
        "QwenImageTransformer2DModel",
        (
            "QwenImagePipeline",
            "QwenImageImg2ImgPipeline",
            "QwenImageInpaintPipeline",
            "QwenImageEditPipeline",
            "QwenImageEditInpaintPipeline",
            "QwenImageEditPlusPipeline",
            "QwenImageLayeredPipeline",
            "QwenImageControlNetPipeline",
            "QwenImageControlNetInpaintPipeline",
        ),
        Conventions(cuts=listed_shapes, varying=_CONTROL),
    ),
    hosted(
        "Qwen-Image 2.1",
        "QwenImage21Transformer2DModel",
        ("QwenImage21Pipeline",),
        # How many tokens it has is asked in Python.
        Conventions(cuts=after_references, passes=_fills_keys, traces=_never),
    ),
    hosted(
        "FLUX.2",
        "Flux2Transformer2DModel",
        ("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline"),
        Conventions(cuts=before_references, depends="img_ids", passes=_fills_keys),
    ),
    hosted(
        "Wan",
        ("WanTransformer3DModel", "WanVACETransformer3DModel"),
        ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline", "WanVACEPipeline", "LucyEditPipeline"),
        Conventions(cuts=after_given_frames, depends="encoder_hidden_states", clock=IN_TIMESTEPS),
    ),
    hosted(
        "Stable Diffusion 3",
        "SD3Transformer2DModel",
        (
            "StableDiffusion3Pipeline",
            "StableDiffusion3Img2ImgPipeline",
            "StableDiffusion3InpaintPipeline",
            "StableDiffusion3ControlNetPipeline",
            "StableDiffusion3ControlNetInpaintingPipeline",
        ),
        Conventions(clock=IN_TIMESTEPS, shares=True, varying=_CONTROL),
    ),
    hosted(
        "Z-Image",
        "ZImageTransformer2DModel",
        (
            "ZImagePipeline",
            "ZImageImg2ImgPipeline",
            "ZImageInpaintPipeline",
            "ZImageControlNetPipeline",
            "ZImageControlNetInpaintPipeline",
            "ZImageOmniPipeline",
        ),
        Conventions(
            argument="x",
            time="t",
            clock=FROM_THE_END,
            sign=-1,
            shares=True,
            prompt_first=True,
            varying=_CONTROL,
            prime=_make_rope,
        ),
    ),
    # Tokens that are given stay within the sample: the pipelines' rescaled guidance looks at all of them.
    hosted(
        "LTX-Video",
        "LTXVideoTransformer3DModel",
        ("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline"),
        Conventions(clock=IN_TIMESTEPS, shares=True),
    ),
    hosted(
        "LTX-2",
        "LTX2VideoTransformer3DModel",
        ("LTX2Pipeline", "LTX2ImageToVideoPipeline", "LTX2ConditionPipeline"),
        Conventions(
            beside="audio_hidden_states",
            clock=IN_TIMESTEPS,
            shares=True,
            varying=("audio_timestep", "sigma", "audio_sigma"),
            wrap=functools.partial(_named, "transformer_ltx2", "AudioVisualModelOutput"),
            output=_pair,
            # Perturbed guidance asks in Python whether all are perturbed.
            traces=_never,
        ),
    ),
    hosted(
        "HunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        ("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
        Conventions(cuts=frames_by_settings, clock=IN_TIMESTEPS),
    ),
    hosted(
        "HunyuanVideo 1.5",
        "HunyuanVideo15Transformer3DModel",
        ("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
        Conventions(cuts=first_channels, clock=IN_TIMESTEPS, traces=_never),
    ),
    hosted(
        "HunyuanImage",
        "HunyuanImageTransformer2DModel",
        ("HunyuanImagePipeline", "HunyuanImageRefinerPipeline"),
        Conventions(cuts=first_channels, clock=IN_TIMESTEPS, traces=_has_no_glyphs),
    ),
    hosted(
        "Chroma",
        "ChromaTransformer2DModel",
        ("ChromaPipeline", "ChromaImg2ImgPipeline"),
        Conventions(varying=_CONTROL),
    ),
    hosted(
        "LongCat-Image",
        "LongCatImageTransformer2DModel",
        ("LongCatImagePipeline", "LongCatImageEditPipeline"),
        _PACKED_WITH_REFERENCES,
    ),
    hosted("Ovis-Image", "OvisImageTransformer2DModel", ("OvisImagePipeline",)),
    hosted("Bria", "BriaTransformer2DModel", ("BriaPipeline",), Conventions(clock=IN_TIMESTEPS, shares=True)),
    hosted(
        "Bria Fibo",
        "BriaFiboTransformer2DModel",
        ("BriaFiboPipeline", "BriaFiboEditPipeline"),
        Conventions(cuts=before_references, depends="img_ids", clock=IN_TIMESTEPS, shares=True),
    ),
    hosted("Bria Fibo 2", "BriaFibo2Transformer2DModel", ("BriaFibo2Pipeline",)),
    hosted("Krea 2", "Krea2Transformer2DModel", ("Krea2Pipeline",)),
    hosted("AuraFlow", "AuraFlowTransformer2DModel", ("AuraFlowPipeline",), Conventions(shares=True)),
    hosted(
        "CogView4",
        "CogView4Transformer2DModel",
        ("CogView4Pipeline", "CogView4ControlPipeline"),
        Conventions(cuts=first_channels, clock=IN_TIMESTEPS),
    ),
    hosted(
        "GLM-Image",
        "GlmImageTransformer2DModel",
        ("GlmImagePipeline",),
        Conventions(clock=Clock(scale=1.0, offset=1.0), passes=_writes_keys),
    ),
    hosted(
        "Lumina 2",
        "Lumina2Transformer2DModel",
        ("Lumina2Pipeline",),
        Conventions(clock=FROM_THE_END, sign=-1, traces=_never),
    ),
    hosted(
        "HiDream",
        "HiDreamImageTransformer2DModel",
        ("HiDreamImagePipeline",),
        Conventions(time="timesteps", clock=IN_TIMESTEPS, sign=-1, shares=True, traces=_never),
    ),
    hosted(
        "ERNIE-Image", "ErnieImageTransformer2DModel", ("ErnieImagePipeline",), Conventions(clock=IN_TIMESTEPS, shares=True)
    ),
    hosted(
        "Sana",
        "SanaTransformer2DModel",
        ("SanaPipeline", "SanaControlNetPipeline", "SanaSprintPipeline", "SanaSprintImg2ImgPipeline"),
        Conventions(clock=IN_TIMESTEPS, shares=True, varying=_CONTROL),
    ),
    hosted(
        "Kandinsky 5",
        "Kandinsky5Transformer3DModel",
        ("Kandinsky5T2VPipeline", "Kandinsky5T2IPipeline", "Kandinsky5I2VPipeline", "Kandinsky5I2IPipeline"),
        Conventions(cuts=marked_frames, depends="encoder_hidden_states", clock=IN_TIMESTEPS, writes_latents=True),
    ),
    hosted(
        "SkyReels-V2",
        "SkyReelsV2Transformer3DModel",
        ("SkyReelsV2Pipeline", "SkyReelsV2ImageToVideoPipeline"),
        Conventions(cuts=first_channels, clock=IN_TIMESTEPS),
    ),
    hosted(
        "Sana Video",
        "SanaVideoTransformer3DModel",
        ("SanaVideoPipeline", "SanaImageToVideoPipeline"),
        Conventions(cuts=after_given_frames, depends="encoder_hidden_states", clock=IN_TIMESTEPS, shares=True),
    ),
    hosted("FLUX.3", "Flux3Transformer2DModel", (), Conventions(varying=("target_timestep",))),
    hosted(
        "Motif-Video",
        "MotifVideoTransformer3DModel",
        ("MotifVideoPipeline",),
        Conventions(cuts=first_channels, clock=IN_TIMESTEPS),
    ),
    hosted(
        "MiniMax-H3",
        "MiniMaxH3Transformer3DModel",
        (),
        Conventions(
            beside="audio_hidden_states",
            schedule="audio_scheduler",
            cuts=after_conditions,
            depends="video_indices",
            moment=of_last_row,
            arrange=with_all_levels,
            clock=IN_TIMESTEPS,
            sign=-1,
            writes_latents=True,
            wrap=functools.partial(_named, "transformer_minimax_h3", "MiniMaxH3TransformerOutput"),
            output=_pair,
        ),
    ),
    hosted("Mochi", "MochiTransformer3DModel", ("MochiPipeline",), Conventions(clock=IN_TIMESTEPS, shares=True)),
    hosted("PRX", "PRXTransformer2DModel", ("PRXPipeline",), Conventions(shares=True)),
    # No flows: models that predict noise, or its difference to a clean image.
    hosted(
        "CogVideoX",
        "CogVideoXTransformer3DModel",
        (
            "CogVideoXPipeline",
            "CogVideoXImageToVideoPipeline",
            "CogVideoXVideoToVideoPipeline",
            "CogVideoXFunControlPipeline",
        ),
        Conventions(cuts=first_channels_of_frames, clock=IN_TIMESTEPS, shares=True, is_flow=False),
    ),
    hosted(
        "PixArt",
        "PixArtTransformer2DModel",
        ("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        Conventions(cuts=before_variances, clock=IN_TIMESTEPS, shares=True, is_flow=False),
    ),
    hosted(
        "DiT",
        "DiTTransformer2DModel",
        ("DiTPipeline",),
        Conventions(cuts=before_variances, clock=IN_TIMESTEPS, shares=True, prompt_first=True, is_flow=False),
    ),
)
