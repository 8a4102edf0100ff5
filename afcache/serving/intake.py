"""What a pipeline would do with its arguments, seen without drawing: where the trajectory begins, and how it ends."""

import contextlib
import copy
import inspect
from typing import Any, NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from afcache.models.families import family_of
from afcache.models.family import Requests


class Departure(NamedTuple):
    """A trajectory before its first step.

    Attributes:
        branches: inputs of each guidance branch, the prompt's first; one sample.
        sigmas: noise levels, one more than steps, float32.
        guidance_scale: of true CFG; unused by one branch.
        output_type: as the pipeline was asked for it.

    """

    branches: tuple[Any, ...]
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
        pipe: of a family whose requests can share a call, that draws by Euler's steps; it is not changed.
        arguments: of its call, for one image.

    Raises:
        NotImplementedError: it steps otherwise, or its transformer is called with what a batch of requests cannot have, or
            something is to be called between its steps.
        ValueError: it would draw several images.
        Exception: what the pipeline itself raises of its arguments.

    """
    given = inspect.signature(type(pipe).__call__).bind(pipe, **arguments)
    given.apply_defaults()
    if given.arguments.get("callback_on_step_end") is not None:
        raise NotImplementedError(
            "callback_on_step_end must be None in a request that shares calls: its steps are not the pipeline's own. "
            "Handle.progress() tells how far it is."
        )
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
    count = len(listener.calls[0]["hidden_states"])
    if count != 1:
        raise ValueError(f"a request draws one image, got {count}: submit one for each, with a seed of its own.")
    branches = tuple(map(requests_of(pipe).read, listener.calls))
    sigmas = scheduler.sigmas[first:].to(torch.float32).cpu()
    # Without a negative prompt the pipeline leaves its scale out of account.
    scale = given.arguments.get("true_cfg_scale", 1.0) if len(branches) > 1 else 1.0
    return Departure(branches, sigmas, float(scale), str(given.arguments["output_type"]))


def requests_of(pipe: Any) -> Requests:
    """How a pipeline's requests share calls.

    Raises:
        NotImplementedError: its family's cannot.

    """
    transformer, name = getattr(pipe, "transformer", None), type(pipe).__name__
    family = None if transformer is None else family_of(transformer)
    if family is None or family.requests is None or name not in family.requests.pipelines:
        raise NotImplementedError(
            f"requests of {name} with {type(transformer).__name__} cannot share calls of it so far. Draw them one by one, with "
            "afcache.compile_pipeline."
        )
    return family.requests


def _check_scheduler(scheduler: Any) -> None:
    is_euler = isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not scheduler.config.get("stochastic_sampling", False)
    if not is_euler:
        raise NotImplementedError(
            f"requests that share a call take Euler's steps, and {type(scheduler).__name__} takes others. Set "
            "pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=False)."
        )


def copied(value: Any) -> Any:
    """A generator or tensor of nobody else's; a list of them, too."""
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return [copied(each) for each in value] if isinstance(value, list) else value
