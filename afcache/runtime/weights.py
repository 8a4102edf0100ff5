"""How the host keeps its weights, and what of that a compiled step can read.

Adapters, casts and offload live in hooks and Python numbers around the layers. A step that runs eagerly calls them like the
host does. One graph cannot: so adapters' scales are shown to it as tensors, casts as a function of the stored weights, and
what moves weights in the middle of a forward is refused.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afcache.runtime.subclasses import is_subclass

_CASTING = "layerwise_casting"
# (layer, adapter's name, its scale as the host has it, as a tensor)
_Scale = tuple[Any, str, float, Tensor]


def check_layers(transformer: nn.Module) -> None:
    """Raise where a layer's hook does what one graph cannot.

    Raises:
        NotImplementedError: naming the layer, its hooks and the way out.

    """
    for name, module in transformer.named_modules():
        hooks = _hooks(module) - ({_CASTING} if isinstance(module, nn.Linear) else set())
        if name and "_hf_hook" in module.__dict__:
            hooks = hooks | {"accelerate"}
        if hooks:
            raise NotImplementedError(
                f"{name or 'transformer'} has hooks {sorted(hooks)}, which act in the middle of the forward and cannot be part "
                "of one graph. Pass compile=False; or, instead of offloading by layers, use pipe.enable_model_cpu_offload()."
            )


class Weights:
    """What may change about a transformer's weights between steps and between images.

    Args:
        transformer: the host's.

    Attributes:
        has_subclasses: weights are tensor subclasses, as torchao's are.
        is_quantised: weights are kept by a quantisation library.

    """

    def __init__(self, transformer: Any) -> None:
        self._transformer = transformer
        self._casts: list[tuple[Any, Callable[..., Tensor]]] = []
        self._adapters: tuple[Any, ...] = ()
        self._layers: list[Any] = []
        self._scales: dict[tuple[int, str], _Scale] = {}
        self.has_subclasses = False
        self.is_quantised = False

    def inspect(self) -> None:
        """At the start of an image: find the layers whose weights are cast for storage or are subclasses."""
        self.has_subclasses = any(is_subclass(parameter) for parameter in self._transformer.parameters())
        # Casting weights for storage alone does not count: it adds no noise.
        self.is_quantised = self.has_subclasses or bool(getattr(self._transformer, "is_quantized", False))
        # The same functions as before for the same layers: Dynamo's guards know them by identity.
        known = {id(module): forward for module, forward in self._casts}
        self._casts = [
            (module, known.get(id(module)) or functools.partial(_cast_linear, module, _compute_dtype(module)))
            for module in self._transformer.modules()
            if isinstance(module, nn.Linear) and _CASTING in _hooks(module)
        ]

    def adapted(self) -> tuple[Any, ...]:
        """What adapters do to the model now, as a value: where it changes, what was remembered belongs to another model.

        Scales are rounded: `joint_attention_kwargs={"scale": s}` multiplies and divides them at every step. Those of adapters
        prepared for hot-swapping are tensors, and reading them waits for the device.
        """
        return tuple(
            (
                tuple(layer.active_adapters),
                tuple(layer.merged_adapters),
                layer.disable_adapters,
                tuple((name, layer.r[name], round(float(scale), 6)) for name, scale in layer.scaling.items()),
            )
            for layer in self._adapted_layers()
        )

    @contextlib.contextmanager
    def traceable(self) -> Iterator[None]:
        """Inside the block: adapters' scales are 0-d tensors, and cast layers compute without their hooks.

        A Python number that changes would be one more graph; a tensor is an input. The hooks that cast make parameters, which
        cannot be traced; what they compute can.
        """
        scales = self._current_scales()
        hooked = [(module, module.__dict__["forward"]) for module, _ in self._casts]
        try:
            for layer, name, _, tensor in scales:
                layer.scaling[name] = tensor
            for module, forward in self._casts:
                module.__dict__["forward"] = forward
            yield
        finally:
            for module, forward in hooked:
                module.__dict__["forward"] = forward
            for layer, name, number, _ in scales:
                layer.scaling[name] = number

    def _adapted_layers(self) -> list[Any]:
        """Layers with adapters; looked for again when an adapter was loaded or deleted."""
        adapters = tuple((getattr(self._transformer, "peft_config", None) or {}).items())
        is_same = len(adapters) == len(self._adapters) and all(
            name == known and config is known_config
            for (name, config), (known, known_config) in zip(adapters, self._adapters, strict=True)
        )
        if not is_same:
            self._adapters, self._scales = adapters, {}
            modules = self._transformer.modules() if adapters else ()
            self._layers = [module for module in modules if isinstance(getattr(module, "scaling", None), dict)]
        return self._layers

    def _current_scales(self) -> list[_Scale]:
        """Every adapter's scale as the host has it now, with a tensor of that value on the layer's device.

        Adapters prepared for hot-swapping have tensors already.
        """
        current = []
        for layer in self._adapted_layers():
            for name, number in layer.scaling.items():
                if torch.is_tensor(number):
                    continue
                known = self._scales.get((id(layer), name))
                device = layer.get_base_layer().weight.device
                if known is None or known[2] != number or known[3].device != device:
                    known = (layer, name, number, torch.tensor(number, dtype=torch.float32, device=device))
                    self._scales[id(layer), name] = known
                current.append(known)
        return current


def _hooks(module: nn.Module) -> set[str]:
    registry = module.__dict__.get("_diffusers_hook")
    return set() if registry is None else set(registry.hooks)


def _compute_dtype(module: Any) -> torch.dtype:
    return module._diffusers_hook.get_hook(_CASTING).compute_dtype


def _cast_linear(module: nn.Linear, dtype: torch.dtype, hidden_states: Tensor) -> Tensor:
    """A linear layer whose weights are stored in another dtype than they compute in."""
    bias = None if module.bias is None else module.bias.to(dtype)
    return F.linear(hidden_states, module.weight.to(dtype), bias)
