"""FLUX.1 as a family."""

from afcache.models.checks import check_cache
from afcache.models.family import IN_SIGMA, Calls, CallsOfRanks, Checks, Family, Known, Requests
from afcache.models.flux1 import checks
from afcache.models.flux1.architecture import FLUX
from afcache.models.flux1.backend import attention_backend, attention_kernel
from afcache.models.flux1.call import OF_BRANCHES, Reader, answer, describe, read_call
from afcache.models.flux1.input_checks import check_inputs
from afcache.models.flux1.inputs import probe_inputs
from afcache.models.flux1.requests import deliver_image, read_request

FLUX1 = Family(
    name="FLUX.1",
    architecture=FLUX,
    calls=Calls(
        reader=Reader,
        answer=answer,
        clock=IN_SIGMA,
        probe=probe_inputs,
        of_ranks=CallsOfRanks(read=read_call, of_branches=OF_BRANCHES, describe=describe),
    ),
    checks=Checks(
        transformer=checks.check_transformer,
        cache=check_cache,
        blocks=checks.check_blocks,
        config=checks.check_config,
        call=checks.check_call,
        inputs=check_inputs,
    ),
    attention_backend=attention_backend,
    attention_kernel=attention_kernel,
    requests=Requests(("FluxPipeline", "FluxImg2ImgPipeline"), read_request, deliver_image),
)


def _flux1(_: type) -> Family:
    return FLUX1


KNOWN = Known(
    name="FLUX.1",
    transformers=("FluxTransformer2DModel",),
    pipelines=(
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxFillPipeline",
        "FluxControlPipeline",
        "FluxControlImg2ImgPipeline",
        "FluxControlInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
        "FluxKontextPipeline",
        "FluxKontextInpaintPipeline",
    ),
    family=_flux1,
)
