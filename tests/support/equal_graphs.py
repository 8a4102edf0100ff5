"""A graph that AOT has taken apart before is not taken apart again: tests trace the same step of the same model many times.

Dynamo traces anew each time, and counts its graphs; what its backend "aot_eager" makes of an equal graph is what it made then.
Two thirds of the time that such a compilation takes are AOT's.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.backends import registry

MOST = 64


def _described(value: Any) -> tuple[Any, ...] | None:
    """All that a trace can depend on of an input; None where that is more than a plain tensor of fixed shape has."""
    if not isinstance(value, torch.Tensor):
        return None
    sizes = (*value.shape, *value.stride(), value.storage_offset())
    is_plain = type(value) in (torch._subclasses.FakeTensor, torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
    if not is_plain or not all(isinstance(size, int) for size in sizes):
        return None
    kind = (value.dtype, value.device, value.requires_grad, value.is_inference(), value.is_conj(), value.is_neg())
    return (type(value), *kind, sizes)


def _operations(graph: torch.fx.GraphModule) -> tuple[Any, ...] | None:
    """Every operation of a graph and of its branches; None where it holds tensors of its own."""
    operations: list[Any] = []
    for name, module in graph.named_modules():
        if not isinstance(module, torch.fx.GraphModule) or [*module.parameters(), *module.buffers()]:
            return None
        for node in module.graph.nodes:
            if node.op == "call_module" or (
                node.op == "get_attr" and not isinstance(getattr(module, node.target, None), torch.fx.GraphModule)
            ):
                return None
            operations.append((name, node.name, node.op, node.target, str((node.args, node.kwargs))))
    return tuple(operations)


def _key(graph: torch.fx.GraphModule, inputs: list[Any]) -> tuple[Any, ...] | None:
    """Equal for graphs of which AOT makes the same; None where that is not known."""
    operations, described = _operations(graph), [_described(value) for value in inputs]
    if operations is None or None in described:
        return None
    memory = [value.untyped_storage()._cdata for value in inputs]
    # Inputs that share memory are traced otherwise, and guarded.
    if len(set(memory)) < len(memory):
        return None
    casts = [torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in ("cpu", "cuda")]
    state = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), *casts)
    return (operations, tuple(described), state)


def remember_graphs() -> Callable[[], None]:
    """From now on "aot_eager" remembers; returns what makes it forget."""
    registry.lookup_backend("aot_eager")
    whole = registry._COMPILER_FNS["aot_eager"]
    made: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def aot_eager(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        key = None if options else _key(graph, inputs)
        if key is None:
            return whole(graph, inputs, **options)
        if key not in made:
            made[key] = whole(graph, inputs)
        made.move_to_end(key)
        while len(made) > MOST:
            made.popitem(last=False)
        return made[key]

    aot_eager._tags = getattr(whole, "_tags", ())  # pyright: ignore[reportFunctionMemberAccess]
    registry._COMPILER_FNS["aot_eager"] = aot_eager

    def forget() -> None:
        registry._COMPILER_FNS["aot_eager"] = whole
        made.clear()

    return forget
