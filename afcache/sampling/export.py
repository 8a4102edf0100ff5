"""The denoising step as a torch.export program: a file that runs without AFCache, diffusers and the transformer's code."""

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from afcache._typing import HostModule
from afcache.functional.state import StepSchedule
from afcache.runtime.subclasses import is_subclass
from afcache.sampling.loop import Journey, prepare
from afcache.sampling.primitives import denoising_step
from afcache.settings.config import CacheConfig

# Every step puts its own in their place.
_PLACED = ("hidden_states", "timestep")


def export_step(
    transformer: HostModule, inputs: Any, *, negative: Any = None, config: CacheConfig | None = None
) -> ExportedProgram:
    """Export the step that `denoise` would call with the same arguments; decisions stay branches of its graph.

    program = afcache.export_step(transformer, inputs, config=config)
    torch.export.save(program, "step.pt2")

    `program.module()` takes `(inputs, latents, states, schedule, guidance_scale)` and returns `(latents, states, records)`, as
    `denoising_step` does, with plain dicts in place of NamedTuples (absent fields are left out, and of the inputs latents and
    timestep), so that nothing but torch is needed to load and to run it. `program.example_inputs[0]` are such arguments: this
    prompt, empty states, the first step.

    Args:
        transformer: owner of the weights, which become part of the program.
        inputs: as `denoise` takes them. Shapes, dtypes, device, and which optional fields there are become fixed.
        negative: inputs of the negative prompt: a second branch, with a guidance scale given at every step.
        config: settings; "balanced" by default. Only tolerance, growth limit, damping, noise floor, and which steps are forced,
            stay open: they are in the schedule.

    Returns:
        the program, for torch.export.save, torch.compile, or torch._inductor.aoti_compile_and_package.

    Raises:
        TypeError, ValueError, NotImplementedError: what `denoise` raises.
        NotImplementedError: quantised weights, or hooks that cast or move weights at every call.

    """
    # Of a schedule of many steps, whose tolerance is that of the settings.
    sigmas = torch.linspace(1.0, 0.0, 29)
    journey = prepare(transformer, (inputs, negative), sigmas, guidance_scale=1.0, config=config)
    _check_weights(transformer)
    branches, (latents, states, *_) = journey.branches, journey.start
    plain = tuple({name: part for name, part in branch.items() if name not in _PLACED} for branch in _plain(branches))
    module = _Step(journey)
    with torch.no_grad():
        arguments = (plain, latents, _plain(states), _plain(journey.schedule[0]), journey.guidance_scale)
        program = torch.export.export(module, arguments)
    _forget_sources(program)
    return program


def _check_weights(transformer: HostModule) -> None:
    for name, parameter in transformer.named_parameters():
        if is_subclass(parameter):
            raise NotImplementedError(
                f"transformer.{name} is a {type(parameter).__name__}, and torch.export takes no such weights inside "
                "torch.cond. Export the transformer before it is quantised."
            )
    for name, module in transformer.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and registry.hooks:
            raise NotImplementedError(
                f"transformer.{name} has diffusers hooks {sorted(registry.hooks)}, which cannot be exported: they cast or move "
                "weights at every call. Export the transformer before enabling layerwise casting or group offload."
            )


def _forget_sources(program: ExportedProgram) -> None:
    """Stack traces are most of a saved program's graph, and tell the folders of this machine."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


class _Step(torch.nn.Module):
    """`denoising_step` over plain containers; the weights are its submodule's."""

    def __init__(self, journey: Journey) -> None:
        super().__init__()
        self.transformer = journey.model.transformer
        self._branches, self._states = journey.branches, journey.start.states
        self._static = {"architecture": journey.model.architecture, "kernel": journey.model.kernel, "config": journey.config}

    def forward(
        self,
        inputs: tuple[dict[str, Any], ...],
        latents: Tensor,
        states: tuple[dict[str, Any], ...],
        schedule: dict[str, Any],
        guidance_scale: Tensor,
    ) -> Any:
        return _plain(
            denoising_step(
                self.transformer,
                _named(self._branches, inputs),
                latents,
                _named(self._states, states),
                StepSchedule(**schedule),
                guidance_scale,
                **self._static,
            )
        )


def _plain(value: Any) -> Any:
    """NamedTuples as dicts of the tensors that they hold."""
    if hasattr(value, "_fields"):
        parts = {name: _plain(part) for name, part in value._asdict().items()}
        return {name: part for name, part in parts.items() if isinstance(part, Tensor) or part}
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def _named(model: Any, plain: Any) -> Any:
    """`plain` as the types of `model`, whose own values stand for the fields that are left out."""
    if hasattr(model, "_fields"):
        return model._replace(**{name: _named(getattr(model, name), part) for name, part in plain.items()})
    return tuple(map(_named, model, plain)) if isinstance(model, tuple) else plain
