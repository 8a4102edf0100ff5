"""Quantised weights inside torch.cond: tensor subclasses are handed to its branches in their parts.

Quantisation libraries keep a weight as a subclass that holds plain tensors (integers, scales). AOTAutograd has no rule for
such an operand of `torch.cond` (torch 2.13). The parts are ordinary operands, and each branch puts them together again.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_COND = torch.ops.higher_order.cond


def is_subclass(tensor: object) -> bool:
    """Whether a tensor is made of other tensors. Functionalisation's own wrapper, met while tracing, does not count."""
    return is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, FunctionalTensor)


def opening(compile_graph: Callable[..., Any]) -> Callable[..., Any]:
    """A backend that opens the subclasses among a graph's inputs, around one that cannot.

    Nothing outlives the compilation: no operator and no class is registered or changed.

    Args:
        compile_graph: a backend, as a function of a graph, its example inputs and options.

    """

    def compile_opened(graph: torch.fx.GraphModule, example_inputs: list[Any], **options: Any) -> Any:
        if not any(is_subclass(value) for value in example_inputs):
            return compile_graph(graph, example_inputs, **options)
        with _OpenOperands():
            return compile_graph(graph, example_inputs, **options)

    return compile_opened


class _OpenOperands(TorchFunctionMode):
    """Give every torch.cond the parts of its operands."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is not _COND or kwargs or not any(is_subclass(operand) for operand in args[3]):
            return func(*args, **(kwargs or {}))
        predicate, true_branch, false_branch, operands = args
        opened = [take_apart(operand) for operand in operands]
        parts = tuple(part for own, _ in opened for part in own)

        def closed(run: Callable[..., Any]) -> Callable[..., Any]:
            def run_on_parts(*leaves: Any) -> Any:
                remaining = iter(leaves)
                with self:
                    return run(*[put_together(remaining) for _, put_together in opened])

            return run_on_parts

        return func(predicate, closed(true_branch), closed(false_branch), parts)


def take_apart(value: Any) -> tuple[list[Any], Callable[[Iterator[Any]], Any]]:
    """The plain tensors that a value is made of, and the function that makes it again of an iterator over such.

    Args:
        value: a subclass, whose parts may be subclasses; or anything else, which is its own only part.

    """
    if not is_subclass(value):
        return [value], next
    names, context = value.__tensor_flatten__()
    opened = {name: take_apart(getattr(value, name)) for name in names}
    kind, size, stride = type(value), value.size(), value.stride()

    def put_together(leaves: Iterator[Any]) -> Tensor:
        inner = {name: rebuild(leaves) for name, (_, rebuild) in opened.items()}
        return kind.__tensor_unflatten__(inner, context, size, stride)

    return [part for own, _ in opened.values() for part in own], put_together
