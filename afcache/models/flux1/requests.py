"""Requests for FLUX.1 images that share calls of the transformer."""

from typing import Any

import torch
from torch import Tensor

from afcache.functional.samples import take_samples
from afcache.models.flux1.inputs import FluxInputs


def read_request(arguments: dict[str, Any]) -> FluxInputs:
    """A pipeline's call of the transformer as a value, with memory of its own.

    Raises:
        NotImplementedError: it has a ControlNet, image prompts, or scales of adapters.

    """
    given = {name: value for name, value in arguments.items() if value is not None and name != "return_dict"}
    alike = [name for name in FluxInputs._fields if not name.startswith("controlnet")]
    # An empty dictionary of options says nothing.
    if unknown := [name for name, value in given.items() if name not in alike and value != {}]:
        raise NotImplementedError(
            f"requests that share a call cannot have {', '.join(sorted(unknown))}: draw this one with afcache.compile_pipeline."
        )
    known = {name: value for name, value in given.items() if name in alike}
    return take_samples(FluxInputs(**{"guidance": None, **known}), range(len(known["hidden_states"])))


def deliver_image(pipe: Any, inputs: FluxInputs, latents: Tensor, output_type: str) -> Any:
    """The image of latents, as the pipeline makes it.

    Args:
        pipe: with its autoencoder.
        inputs: of the prompt, whose positions say how large the image is.
        latents: packed, of one image.
        output_type: as of the pipeline's call; "latent" leaves them as they are.

    """
    if output_type == "latent":
        return latents[0]
    rows, columns = (int(inputs.img_ids[:, axis].max()) + 1 for axis in (1, 2))
    factor = 2 * pipe.vae_scale_factor
    unpacked = pipe._unpack_latents(latents, factor * rows, factor * columns, pipe.vae_scale_factor)
    scaled = unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    with torch.no_grad():
        decoded = pipe.vae.decode(scaled.to(pipe.vae.dtype), return_dict=False)[0]
    return pipe.image_processor.postprocess(decoded, output_type=output_type)[0]
