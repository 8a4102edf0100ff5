"""A pipeline without its weights: what it is, what its call takes, and whether it is cached, from its configs alone."""

import importlib
import inspect
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.guiders import BaseGuidance

from afcache.cli.model import Model, part_config
from afcache.cli.silence import quiet_imports
from afcache.models.families import family_of, transformers_of
from afcache.pipeline import compile_pipeline
from afcache.runtime.binding import bound_runtime

# What pipelines that change pictures are given them in.
_PICTURES = ("image", "video", "control_image", "control_video")
# Pipelines that take one of these, and draw without as well.
_TEXT_IS_ENOUGH = frozenset(
    {
        "FluxKontextPipeline",
        "QwenImage21Pipeline",
        "Flux2Pipeline",
        "Flux2KleinPipeline",
        "Flux2KleinKVPipeline",
        "LTXConditionPipeline",
        "ZImageOmniPipeline",
        "BriaFibo2Pipeline",
        "GlmImagePipeline",
    }
)


@dataclass(frozen=True)
class Outline:
    """What is known of a pipeline before its weights are loaded.

    Attributes:
        model: where it is.
        kinds: classes of its parts that are there.
        pipe: an instance with transformers on the device "meta", scheduler and guider, and nothing else.

    """

    model: Model
    kinds: dict[str, type]
    pipe: Any

    @cached_property
    def call(self) -> dict[str, Any]:
        """Parameters of the pipeline's call, with their defaults."""
        parameters = inspect.signature(type(self.pipe).__call__).parameters.values()
        named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
        return {each.name: each.default for each in named if each.name != "self"}

    @property
    def transformers(self) -> list[Any]:
        """Without weights."""
        return transformers_of(self.pipe)

    @property
    def family(self) -> Any:
        """The family of its transformers."""
        return family_of(self.transformers[0])

    @property
    def embeds_guidance(self) -> bool:
        """Whether a guidance scale is an input of the transformer."""
        return any(transformer.config.get("guidance_embeds") for transformer in self.transformers)

    @property
    def shared_heads(self) -> int | None:
        """Attention heads that several processes can share; None where one process draws."""
        if not self.transformers or self.family.calls.of_ranks is None:
            return None
        return self.transformers[0].config.num_attention_heads

    @property
    def is_called(self) -> bool:
        """Whether computed steps are the model's own forward, called, as `check_cached` has found out."""
        runtimes = map(bound_runtime, self.transformers)
        return any(runtime is not None and runtime.options.keeps_host for runtime in runtimes)

    @property
    def num_blocks(self) -> int:
        """Of all transformers."""
        return sum(map(count_blocks, self.transformers))


def count_blocks(transformer: torch.nn.Module) -> int:
    """How many blocks a transformer is a stack of."""
    stacks = [child for child in transformer.children() if isinstance(child, torch.nn.ModuleList)]
    return sum("Block" in type(block).__name__ for stack in stacks for block in stack)


def outline(model: Model) -> Outline:
    """Find the classes of a pipeline and of its parts, and make what weighs nothing.

    Raises:
        ValueError: diffusers does not know a class, or a config cannot be read or makes no model.

    """
    kind = getattr(diffusers, model.pipeline, None)
    if not isinstance(kind, type) or not issubclass(kind, DiffusionPipeline):
        raise ValueError(
            f"--model {model.name!r} is a {model.pipeline}, which is no pipeline of diffusers {diffusers.__version__}. Is "
            "another version needed, or code of its own? In Python, afcache.compile_pipeline takes what can be loaded."
        )
    kinds = {name: found for name, pair in model.parts.items() if (found := _find(model, name, *pair)) is not None}
    pipe = object.__new__(kind)
    with quiet_imports():
        for name, its in kinds.items():
            if name in ("transformer", "transformer_2", "unconditional_transformer"):
                pipe.__dict__[name] = _without_weights(model, name, its)
            elif issubclass(its, SchedulerMixin | BaseGuidance):
                pipe.__dict__[name] = _load_settings(model, name, its)
    return Outline(model, kinds, pipe)


def check_cached(found: Outline, **settings: Any) -> None:
    """Ask `compile_pipeline` about a pipeline that has no weights.

    Args:
        found: the pipeline, whose transformers without weights are bound by it.
        settings: what `compile_pipeline` is to be called with.

    Raises:
        NotImplementedError, ValueError: what it says.

    """
    if not found.transformers:
        raise NotImplementedError(
            f"--model {found.model.name!r} is a {found.model.pipeline} without a transformer: what is cached are diffusion "
            "transformers (docs/compatibility.md). --no-cache runs it as it is."
        )
    # What it warns of is said again when the pipeline is there.
    with quiet_imports():
        compile_pipeline(found.pipe, **settings)


def check_text_alone(found: Outline) -> None:
    """Raise where a prompt is not enough to draw, or what comes of it is no picture.

    Raises:
        ValueError: naming what it needs.

    """
    kind = type(found.pipe).__name__
    needed = [name for name, default in found.call.items() if default is inspect.Parameter.empty and name != "prompt"]
    if kind not in _TEXT_IS_ENOUGH:
        needed += [name for name in _PICTURES if name in found.call and name not in needed]
    if needed:
        prompt = "prompt=..., " if "prompt" in found.call else ""
        raise ValueError(
            f"--model {found.model.name!r} is a {kind}, which needs {', '.join(needed)}; the command draws from text alone. In "
            "Python, afcache.compile_pipeline takes it: pipe = afcache.compile_pipeline(pipe); "
            f"pipe({prompt}{needed[0]}=...)."
        )
    if not {"prompt", "height", "width"} <= set(found.call):
        raise ValueError(
            f"--model {found.model.name!r} is a {kind}, which draws neither pictures nor videos from text. In Python, "
            "afcache.compile_pipeline takes what is in docs/compatibility.md."
        )


def _find(model: Model, part: str, library: str, name: str) -> type | None:
    """The class of a part; None where it is of another library, which diffusers may know how to load."""
    home: ModuleType | None = getattr(diffusers.pipelines, library, None)
    if library in ("diffusers", "transformers"):
        home = importlib.import_module(library)
    if home is None:
        return None
    with quiet_imports():
        kind = getattr(home, name, None)
    if not isinstance(kind, type):
        raise ValueError(
            f"--model {model.name!r}: model_index.json names {library}.{name} as {part}, which is not in the version that is "
            "installed. Install the version that the model was saved with, or a newer one."
        )
    return kind


def _without_weights(model: Model, part: str, kind: Any) -> Any:
    config = part_config(model, part, "_class_name")
    try:
        with torch.device("meta"):
            return kind.from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--model {model.name!r}: {part}/config.json makes no {kind.__name__}: {reason}. Download the model again, or mend "
            "the file."
        ) from error


def _load_settings(model: Model, part: str, kind: Any) -> Any:
    try:
        return kind.from_pretrained(model.name, subfolder=part)
    except (OSError, ValueError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--model {model.name!r}: {part} could not be loaded: {reason.rstrip('.')}. Download the model again, or mend its "
            "files."
        ) from error
