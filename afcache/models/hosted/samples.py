"""Where the sample is in a call of a transformer, and in what it returns: beside it there may be references and conditions."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Cut(NamedTuple):
    """A part of an axis; static.

    Attributes:
        axis: of the tensor, the batch being 0.
        start, length: of the part; a start below 0 counts from the end, where the output may have another number before it.
        is_returned: whether the output has the rest of the axis as well.
        beyond: how many elements the output alone has, after the rest.
        is_beside: whether it is of what is drawn beside the sample.

    """

    axis: int
    start: int
    length: int
    is_returned: bool = True
    beyond: int = 0
    is_beside: bool = False


Cuts = tuple[Cut, ...]


# A tensor, a list with an entry for each image, or a pair of tensors that are drawn together.
Argument = Any


def own_sample(argument: Argument, *, is_kept: bool = True) -> Argument:
    """The argument as one graph takes it at every step: contiguous, and with no two tensors in one memory.

    Latents are packed once, as a view, and fresh from then on: two layouts would be two graphs. Lists hold views of one tensor,
    of which torch.cond takes one.

    Args:
        argument: of a call.
        is_kept: whether a tensor stays what it is after the call; else it is copied.

    """
    if isinstance(argument, tuple):
        return tuple(own_sample(each, is_kept=is_kept) for each in argument)
    if not isinstance(argument, list):
        return argument.contiguous() if is_kept else argument.clone(memory_format=torch.contiguous_format)
    return [[*each[:-1], each[-1].clone()] if isinstance(each, list) else each.clone() for each in argument]


def read_sample(argument: Argument, cuts: Cuts) -> Tensor:
    """The sample, `[batch, *latent]`: the argument itself, or a tensor of its own.

    Of a list it is the stack of its entries; an entry may be a list, too, whose last is the sample. Of a pair, such as video
    and audio, both are in one row, the second scaled so that they weigh alike in every norm, whatever their sizes.
    """
    if isinstance(argument, tuple):
        return _in_one_row(*_narrow_two(argument, cuts))
    x = argument
    if isinstance(argument, list):
        x = torch.stack([each[-1] if isinstance(each, list) else each for each in argument])
    return _narrow(x, cuts).clone(memory_format=torch.contiguous_format) if cuts else x


def cut_output(output: Any, cuts: Cuts) -> Tensor:
    """The part of an output that belongs to the sample."""
    returned = tuple(cut for cut in cuts if cut.is_returned)
    if isinstance(output, tuple):
        return _in_one_row(*_narrow_two(output, returned))
    whole = torch.stack(list(output)) if isinstance(output, list) else output
    return _narrow(whole, returned)


def fill_output(velocity: Tensor, argument: Argument, cuts: Cuts) -> Any:
    """What the pipeline expects: zero where it throws away what it gets.

    Args:
        velocity: of the sample.
        argument: that the sample came in.
        cuts: of the sample.

    """
    if isinstance(argument, tuple):
        parts = zip(_in_two(velocity, *_narrow_two(argument, cuts)), argument, _of_each(cuts), strict=True)
        return tuple(fill_output(part, its, mine) for part, its, mine in parts)
    if isinstance(argument, list):
        return list(velocity.unbind())
    for cut in cuts:
        before = cut.start if cut.start >= 0 else argument.shape[cut.axis] + cut.start
        missing = argument.shape[cut.axis] - before - cut.length + cut.beyond
        if cut.is_returned and (before or missing):
            axis = cut.axis % velocity.ndim
            velocity = F.pad(velocity, [0, 0] * (velocity.ndim - axis - 1) + [before, missing])
    return velocity


def place_sample(argument: Argument, x: Tensor, cuts: Cuts) -> Argument:
    """The argument with another sample in it; everything fresh."""
    if isinstance(argument, tuple):
        parts = zip(argument, _in_two(x, *_narrow_two(argument, cuts)), _of_each(cuts), strict=True)
        return tuple(place_sample(its, part, mine) for its, part, mine in parts)
    if isinstance(argument, list):
        pairs = zip(argument, x.unbind(), strict=True)
        return [[*each[:-1], new.clone()] if isinstance(each, list) else new.clone() for each, new in pairs]
    if not cuts:
        return x
    placed = argument.clone(memory_format=torch.contiguous_format)
    _narrow(placed, cuts).copy_(x)
    return placed


def _narrow(tensor: Tensor, cuts: Cuts) -> Tensor:
    for cut in cuts:
        tensor = tensor.narrow(cut.axis, cut.start, cut.length)
    return tensor


def _of_each(cuts: Cuts) -> tuple[Cuts, Cuts]:
    """Of the sample, and of what is beside it."""
    return tuple(cut for cut in cuts if not cut.is_beside), tuple(cut for cut in cuts if cut.is_beside)


def _narrow_two(pair: tuple[Tensor, Tensor], cuts: Cuts) -> tuple[Tensor, Tensor]:
    first, second = map(_narrow, pair, _of_each(cuts))
    return first, second


def _in_one_row(first: Tensor, second: Tensor) -> Tensor:
    """`[batch, all elements]`."""
    return torch.cat([first.flatten(1), _weight(first, second) * second.flatten(1)], dim=1)


def _in_two(row: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """What `_in_one_row` joined, in the shapes of two others."""
    size = math.prod(first.shape[1:])
    return row[:, :size].reshape(first.shape).clone(), (row[:, size:] / _weight(first, second)).reshape(second.shape)


def _weight(first: Tensor, second: Tensor) -> float:
    """The nearest power of two, by which numbers are multiplied and divided without rounding."""
    return 2.0 ** round(math.log2(math.prod(first.shape[1:]) / math.prod(second.shape[1:])) / 2)
