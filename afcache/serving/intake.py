"""What a pipeline would do with its arguments, seen without drawing: where the trajectory begins, and how it ends."""

import contextlib
import copy
import inspect
from typing import Any, NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from afcache.functional.samples import take_samples
from afcache.models.flux1.inputs import FluxInputs


class Departure(NamedTuple):
    """A trajectory before its first step.

    Attributes:
        branches: inputs of each guidance branch, the prompt's first; one sample.
        sigmas: noise levels, one more than steps, float32.
        guidance_scale: of true CFG; unused by one branch.
        output_type: as the pipeline was asked for it.

    """

    branches: tuple[FluxInputs, ...]
    sigmas: Tensor
    guidance_scale: float
    output_type: str


class _ArrivedError(Exception):
    """The pipeline has come to its first step."""


class _Listener:
    """Stands for the transformer, and remembers how it is called; nothing is computed.

    Args:
        transformer: everything else is asked of it.

    """

    def __init__(self, transformer: Any) -> None:
        self.calls: list[dict[str, Any]] = []
        self._transformer = transformer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transformer, name)

    def __call__(self, **given: Any) -> tuple[Tensor]:
        self.calls.append(given)
        return (torch.zeros_like(given["hidden_states"]),)


@torch.no_grad()
def depart(pipe: Any, arguments: dict[str, Any]) -> Departure:
    """Let a pipeline encode its prompts and draw its noise, up to its first step.

    Args:
        pipe: a FLUX.1 pipeline that draws by Euler's steps; it is not changed.
        arguments: of its call, for one image.

    Raises:
        NotImplementedError: it steps otherwise, or its transformer is called with what a batch of requests cannot have.
        ValueError: it would draw several images.
        Exception: what the pipeline itself raises of its arguments.

    """
    given = inspect.signature(type(pipe).__call__).bind(pipe, **arguments)
    given.apply_defaults()
    listener, scheduler = _Listener(pipe.transformer), copy.deepcopy(pipe.scheduler)
    _check_scheduler(scheduler)
    own = copy.copy(pipe)
    # Not by assignment, which would write into the configuration that both pipelines share.
    vars(own).update(transformer=listener, scheduler=scheduler)
    own.set_progress_bar_config(disable=True)
    timesteps: list[Tensor] = []

    def arrive(model_output: Tensor, timestep: Tensor, *rest: Any, **options: Any) -> None:
        timesteps.append(timestep)
        raise _ArrivedError

    scheduler.step = arrive
    with contextlib.suppress(_ArrivedError):
        own(**arguments)
    first = scheduler.begin_index
    first = scheduler.index_for_timestep(timesteps[0]) if first is None else first
    branches = tuple(_inputs(call) for call in listener.calls)
    if len(branches[0].hidden_states) != 1:
        raise ValueError(
            f"a request draws one image, got {len(branches[0].hidden_states)}: submit one for each, with a seed of its own."
        )
    sigmas = scheduler.sigmas[first:].to(torch.float32).cpu()
    scale, kind = given.arguments.get("true_cfg_scale", 1.0), given.arguments["output_type"]
    return Departure(branches, sigmas, float(scale), str(kind))


def _check_scheduler(scheduler: Any) -> None:
    is_euler = isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not scheduler.config.get("stochastic_sampling", False)
    if not is_euler:
        raise NotImplementedError(
            f"requests that share a call take Euler's steps, and {type(scheduler).__name__} takes others. Set "
            "pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=False)."
        )


def _inputs(call: dict[str, Any]) -> FluxInputs:
    """A call as a value; the pipeline's own tensors are not kept."""
    options = {name for name, value in call.items() if value is not None and name not in FluxInputs._fields}
    if unknown := options - {"return_dict", "joint_attention_kwargs"} or call.get("joint_attention_kwargs"):
        raise NotImplementedError(
            f"requests that share a call cannot have {sorted(unknown)}: draw this one with afcache.compile_pipeline."
        )
    known = {name: value for name, value in call.items() if name in FluxInputs._fields and value is not None}
    return take_samples(FluxInputs(**{"guidance": None, **known}), range(len(known["hidden_states"])))


def deliver(pipe: Any, branch: FluxInputs, latents: Tensor, output_type: str) -> Any:
    """The image of latents, as the pipeline makes it.

    Args:
        pipe: with its autoencoder.
        branch: inputs of the prompt, whose positions say how large the image is.
        latents: packed, of one image.
        output_type: "latent" leaves them as they are.

    """
    if output_type == "latent":
        return latents[0]
    rows, columns = (int(branch.img_ids[:, axis].max()) + 1 for axis in (1, 2))
    factor = 2 * pipe.vae_scale_factor
    unpacked = pipe._unpack_latents(latents, factor * rows, factor * columns, pipe.vae_scale_factor)
    scaled = unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    with torch.no_grad():
        decoded = pipe.vae.decode(scaled.to(pipe.vae.dtype), return_dict=False)[0]
    return pipe.image_processor.postprocess(decoded, output_type=output_type)[0]
