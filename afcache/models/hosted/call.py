"""A call of a transformer that runs its own forward, as its pipelines make it, answered by a cached forward."""

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor
from torch.utils import _pytree as pytree

from afcache._typing import Flag, HostModule
from afcache.models.family import Call
from afcache.models.hosted.architecture import HostInputs, latents_of, output_of, velocity_of
from afcache.models.hosted.conventions import Conventions, given_sample, with_sample
from afcache.models.hosted.pace import Pace, pace_of
from afcache.models.hosted.samples import Cuts, own_sample

# Where pipelines put options of attention, among them the scale of adapters.
_OPTIONS = ("joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs")
# Of a call's structure; a later one of the same image cannot hold other branches.
_LOOKS = 2


class Reader:
    """Reads what of a call is no argument of its own, once for each tensor that it depends on.

    Args:
        transformer: the host's.
        conventions: how its pipelines call it.

    Attributes:
        sign: 1 where its output is the velocity, -1 where pipelines turn it round.

    """

    def __init__(self, transformer: HostModule, conventions: Conventions) -> None:
        self.sign = conventions.sign
        self._transformer = transformer
        self._conventions = conventions
        self._names = [name for name in inspect.signature(type(transformer).forward).parameters if name != "self"]
        self._cuts: tuple[weakref.ref[Tensor], Any, Cuts] | None = None
        self._shared: tuple[weakref.ref[Tensor] | None, Any, int, int] | None = None
        self._is_primed = False

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return dict(zip(self._names, args, strict=False)) | kwargs

    def forget(self) -> None:
        """Look at the next call as if it were the first."""
        self._cuts = self._shared = None

    def read(self, arguments: dict[str, Any], pace: Pace | None = None) -> Call:
        """What the runtime asks of a call.

        Args:
            arguments: of the transformer's forward, but `return_dict` and the scale of adapters.
            pace: of what is drawn beside the sample, once that is known.

        """
        conventions = self._conventions
        if conventions.prime is not None and not self._is_primed:
            conventions.prime(self._transformer)
            self._is_primed = True
        source = given_sample(conventions, arguments)
        given = own_sample(source, is_kept=not conventions.writes_latents)
        arguments = conventions.arrange(with_sample(conventions, arguments, given))
        structure = _structure(arguments)
        conditions = _tensors({name: value for name, value in arguments.items() if not self._varies(name)})
        cuts = self._cuts_of(arguments, structure)
        inputs = HostInputs(arguments, cuts, self.sign, pace=pace)
        x = latents_of(conventions, inputs)
        branches = self._branches_of(x, structure, conditions)
        return Call(
            inputs=inputs,
            latents=x if branches == 1 else x.chunk(branches)[0],
            source=pytree.tree_leaves(source)[0],
            timestep=arguments[conventions.time] if conventions.moment is None else conventions.moment(arguments),
            prefix_length=0,
            conditions=tuple(conditions),
            is_controlled=_is_controlled(arguments),
            structure=structure,
            branches=branches,
            ask=functools.partial(self._ask, inputs, x.shape),
        )

    def _varies(self, name: str) -> bool:
        """Whether an argument differs at every step: the sample, time in any form, and what is named."""
        named = (self._conventions.argument, self._conventions.beside, self._conventions.time, *self._conventions.varying)
        return name in named or name.startswith("timestep")

    def _ask(self, inputs: HostInputs, shape: torch.Size, host: Callable[..., Any]) -> Tensor:
        """The velocity by the host's own forward."""
        result = host(**inputs.arguments, return_dict=False)
        return velocity_of(self._conventions, inputs, result).reshape(shape).contiguous()

    def _cuts_of(self, arguments: dict[str, Any], structure: Any) -> Cuts:
        named = arguments.get(self._conventions.depends)
        if not isinstance(named, Tensor):
            return self._conventions.cuts(self._transformer, arguments)
        if self._cuts is None or self._cuts[0]() is not named or self._cuts[1] != structure:
            self._cuts = (weakref.ref(named), structure, self._conventions.cuts(self._transformer, arguments))
        return self._cuts[2]

    def _branches_of(self, x: Tensor, structure: Any, conditions: list[Tensor]) -> int:
        """How many guidance branches share a call: its halves are then at the same latents.

        A batch of two images may begin at the same noise, but its second step tells them apart.
        """
        if not self._conventions.shares or len(x) % 2:
            return 1
        named = conditions[0] if conditions else None
        if self._shared is None or self._shared[1] != structure or _target(self._shared[0]) is not named:
            self._shared = (None if named is None else weakref.ref(named), structure, 2, 0)
        reference, _, branches, looks = self._shared
        if looks < _LOOKS:
            first, second = x.chunk(2)
            branches = 2 if torch.equal(torch.nan_to_num(first), torch.nan_to_num(second)) else 1
            self._shared = (reference, structure, branches, looks + 1)
        return branches


class Reading:
    """One call, which may be read again where it turns out to begin an image, or once it is known at which step it is.

    Args:
        reader: of calls.
        arguments: of the transformer's forward.
        is_paced: whether something is drawn beside the sample on a schedule of its own.

    Attributes:
        call: as it was read last.

    """

    def __init__(self, reader: Reader, arguments: dict[str, Any], *, is_paced: bool = False) -> None:
        self._reader, self._arguments = reader, arguments
        self._pace: Pace | None = None
        self.call = self._read()._replace(placed=self._placed if is_paced else None)

    def _read(self) -> Call:
        self.call = self._reader.read(self._arguments, self._pace)._replace(again=self._again)
        return self.call

    def _again(self) -> Call:
        self._reader.forget()
        return self._read()

    def _placed(self, sigmas: Tensor, beside: Tensor, index: int) -> Call:
        # Most schedulers keep their levels on the host.
        self._pace = pace_of(sigmas.to(self.call.latents.device), beside, index)
        return self._read()


def answer(
    conventions: Conventions,
    transformer: HostModule,
    reader: Reader,
    forward: Callable[[Call], Tensor],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The transformer's forward by another one.

    Args:
        conventions: how its pipelines call it.
        transformer: the host's, whose adapters are scaled as the call asks.
        reader: of its calls.
        forward: from a call to the velocity of its sample.
        args, kwargs: of the call.

    """
    arguments = reader.bind(args, kwargs)
    returns_dict = arguments.pop("return_dict", True)

    def run(_: HostModule, **options: Any) -> Any:
        # The decorator around this has taken the scale out.
        reading = Reading(reader, {**arguments, **options}, is_paced=bool(conventions.schedule))
        velocity = forward(reading.call)
        # Of a family that was never seen the sign may have been found out meanwhile.
        inputs = reading.call.inputs._replace(sign=reader.sign)
        return output_of(conventions, inputs, velocity, given_sample(conventions, arguments))

    for name in _OPTIONS:
        if "scale" in (arguments.get(name) or {}):
            output = apply_lora_scale(name)(run)(transformer, **{name: arguments[name]})
            break
    else:
        output = run(transformer)
    if conventions.beside:
        return conventions.wrap(*output) if returns_dict else output
    return conventions.wrap(sample=output) if returns_dict else (output,)


def _target(reference: weakref.ref[Tensor] | None) -> Tensor | None:
    return None if reference is None else reference()


def _structure(arguments: dict[str, Any]) -> Any:
    """Shapes of tensors and all other values, in their places."""
    leaves, spec = pytree.tree_flatten(arguments)
    return spec, tuple(leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in leaves)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _is_controlled(arguments: dict[str, Any]) -> Flag | None:
    """Whether ControlNets' residuals are other than 0, 0-d; None where there are none."""
    samples = [_tensors(value)[:1] for name, value in arguments.items() if "controlnet" in name]
    given = [tensor.any() for found in samples for tensor in found]
    return torch.stack(given).any() if given else None
