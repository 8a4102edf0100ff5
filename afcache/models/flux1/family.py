"""FLUX.1 as a family."""

from diffusers import (
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)

from afcache.models.family import Calls, Checks, Family
from afcache.models.flux1 import checks
from afcache.models.flux1.architecture import FLUX
from afcache.models.flux1.backend import attention_backend, attention_kernel
from afcache.models.flux1.call import OF_BRANCHES, Reader, answer, describe, read_call
from afcache.models.flux1.input_checks import check_inputs
from afcache.models.flux1.inputs import probe_inputs

FLUX1 = Family(
    name="FLUX.1",
    transformer=FluxTransformer2DModel,
    pipelines=(
        FluxPipeline,
        FluxImg2ImgPipeline,
        FluxInpaintPipeline,
        FluxFillPipeline,
        FluxControlPipeline,
        FluxControlImg2ImgPipeline,
        FluxControlInpaintPipeline,
        FluxControlNetPipeline,
        FluxControlNetImg2ImgPipeline,
        FluxControlNetInpaintPipeline,
        FluxKontextPipeline,
        FluxKontextInpaintPipeline,
    ),
    architecture=FLUX,
    calls=Calls(
        reader=Reader,
        answer=answer,
        read=read_call,
        of_branches=OF_BRANCHES,
        describe=describe,
        probe=probe_inputs,
    ),
    checks=Checks(
        transformer=checks.check_transformer,
        cache=checks.check_cache,
        blocks=checks.check_blocks,
        config=checks.check_config,
        call=checks.check_call,
        inputs=check_inputs,
    ),
    attention_backend=attention_backend,
    attention_kernel=attention_kernel,
)
