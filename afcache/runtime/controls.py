"""What pipelines ask of their ControlNets, step by step.

A transformer sees the sum of all ControlNets' residuals, which differ at every step anyway. Whether one was switched, or its
image exchanged, shows only in what the ControlNet itself was called with. A hook on the instance notes that.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_afcache_controls"


class Controls(NamedTuple):
    """What ControlNets were called with last.

    Attributes:
        images: control images, as the pipeline encoded them.
        scales: conditioning scales; 0 where a ControlNet is off.

    """

    images: tuple[Tensor, ...] = ()
    scales: tuple[float, ...] = ()


def watch(pipes: Iterable[Any]) -> None:
    """Note from now on what the pipelines' ControlNets are called with; once for each instance."""
    for module in _controlnets(pipes):
        if _note not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_note, with_kwargs=True)


def unwatch(pipes: Iterable[Any]) -> None:
    """Undo `watch`."""
    for module in _controlnets(pipes):
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _note]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        module.__dict__.pop(_ATTRIBUTE, None)


def controls_of(pipes: Iterable[Any]) -> Controls:
    """The last calls of all the pipelines' ControlNets; empty where there are none, or none was called yet."""
    calls = [module.__dict__.get(_ATTRIBUTE, Controls()) for module in _controlnets(pipes)]
    return Controls(*(sum(fields, ()) for fields in zip(*calls, strict=True))) if calls else Controls()


def _controlnets(pipes: Iterable[Any]) -> list[nn.Module]:
    """Each instance once."""
    found = (pipe.__dict__.get("controlnet") for pipe in pipes)
    return list({id(module): module for module in found if isinstance(module, nn.Module)}.values())


def _note(module: nn.Module, _: tuple[Any, ...], call: dict[str, Any]) -> None:
    """A forward pre-hook. Inside a graph of the host's own nothing is noted."""
    if torch.compiler.is_compiling():
        return
    images, scales = call.get("controlnet_cond"), call.get("conditioning_scale")
    # Through `__dict__`, so that it is no buffer and no part of the state dict.
    module.__dict__[_ATTRIBUTE] = Controls(tuple(filter(torch.is_tensor, _listed(images))), tuple(map(float, _listed(scales))))


def _listed(value: Any) -> list[Any]:
    """Of several ControlNets pipelines pass lists."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
