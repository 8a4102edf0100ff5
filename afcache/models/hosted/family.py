"""A family whose models run their own forward, from what its pipelines have in common."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from afcache._typing import HostModule
from afcache.functional.model import AttentionKernel, scaled_dot_product_attention
from afcache.models.checks import check_cache
from afcache.models.family import Calls, Checks, Family, Known
from afcache.models.hosted.architecture import hosted_architecture
from afcache.models.hosted.call import Reader, answer
from afcache.models.hosted.conventions import USUAL, Conventions
from afcache.settings.config import CacheConfig


def hosted(
    name: str, transformers: str | tuple[str, ...], pipelines: tuple[str, ...], conventions: Conventions = USUAL
) -> Known:
    """A family of which nothing but its pipelines' calls is described.

    Args:
        name: as users call it.
        transformers: name of the class, or of several.
        pipelines: names of classes.
        conventions: how they call it.

    """
    names = (transformers,) if isinstance(transformers, str) else transformers
    return Known(name, names, pipelines, functools.cache(functools.partial(hosted_family, name, conventions)))


def hosted_family(name: str, conventions: Conventions, kind: type[torch.nn.Module]) -> Family:
    """The family of a class of transformers."""
    return Family(
        name=name,
        # Looked up here: a graph cannot.
        architecture=hosted_architecture(conventions, kind.forward),
        calls=Calls(
            reader=functools.partial(Reader, conventions=conventions),
            answer=functools.partial(answer, conventions),
            clock=conventions.clock,
            prompt_first=conventions.prompt_first,
            beside=conventions.schedule,
            passes=None if conventions.passes is None else functools.partial(_passes, conventions.passes),
        ),
        checks=Checks(
            transformer=_nothing,
            cache=check_cache,
            blocks=_nothing,
            config=functools.partial(_check_config, name),
            call=_nothing,
            inputs=_nothing,
        ),
        attention_backend=attention_backends,
        attention_kernel=_torch_attention,
        dynamic=False,
        traces=conventions.traces,
        is_flow=conventions.is_flow,
    )


def _passes(rule: Callable[[dict[str, Any]], bool], reader: Reader, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return rule(reader.bind(args, kwargs))


def attention_backends(transformer: HostModule) -> Any:
    """The attention kernels that a transformer's layers were told to use, as a value."""
    layers = (getattr(module, "processor", None) for module in transformer.modules())
    return frozenset(str(getattr(layer, "_attention_backend", None)) for layer in layers if layer is not None)


def _torch_attention(_: HostModule) -> AttentionKernel:
    return scaled_dot_product_attention


def _nothing(*_: Any, **__: Any) -> None:
    """Whatever a model's own forward does is right."""


def _check_config(name: str, transformer: HostModule, config: CacheConfig) -> None:
    """Raise where settings ask for the inside of a model.

    Raises:
        ValueError: naming the setting and what to use.

    """
    del transformer
    if config.rule.is_cached and (not config.forecasts_output or config.layerwise is not None):
        setting = f"target={config.target!r}" if config.layerwise is None else "layerwise"
        raise ValueError(
            f"config has {setting} (policy {config.policy!r}), which needs the inside of the model, and of {name} only its "
            "outputs are known. Leave config out, or pass one whose target is 'noise' or 'velocity', without layerwise."
        )
