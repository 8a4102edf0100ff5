"""All tiny pipelines, and which of them are cached."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from afcache import CacheConfig
from afcache.models.families import KNOWN
from tests.support import zoo
from tests.support.zoo.kind import Kind

_HELPERS = ("everything", "kind", "parts", "parts_image", "parts_video")


def _kinds() -> list[Kind]:
    names = sorted(module.name for module in pkgutil.iter_modules(zoo.__path__) if module.name not in _HELPERS)
    modules = [importlib.import_module(f"tests.support.zoo.{name}") for name in names]
    return [kind for module in modules for kind in getattr(module, "KINDS", [])]


KINDS = _kinds()
_CACHED = {name for known in KNOWN for name in known.pipelines}
# Schedulers that draw new noise at every step, which are refused whatever the model.
_REFUSED = {"SanaSprintPipeline", "SanaSprintImg2ImgPipeline", "HiDreamImagePipeline [Dev]", "CogVideoXPipeline [new noise]"}
# Whose transformers nobody has described, and whose first steps explain themselves.
_UNSEEN = ("StableAudio3", "AceStep", "LongCatAudio", "HunyuanVideoFramepack")
_REFUSED |= {"StableAudio3Pipeline [distilled]", "AceStepPipeline"}


# Decided beforehand, so that every model has computed and forecast steps.
MIXED = CacheConfig(target="noise", policy="fixed", interval=2, warmup_steps=2, correction=False)
STEPS = 8


def options_of(kind: Kind) -> dict[str, Any]:
    """Arguments of a call, with guidance where there is any."""
    return (kind.unguided or {}) if kind.guided is None else kind.guided


def class_of(kind: Kind) -> str:
    """The name of a kind's pipeline class."""
    return kind.name.split(" ", 1)[0]


def is_cached(kind: Kind) -> bool:
    """Whether a kind is to be cached."""
    known = class_of(kind) in _CACHED or class_of(kind).endswith("ModularPipeline") or is_unseen(kind)
    return known and kind.name not in _REFUSED


def is_unseen(kind: Kind) -> bool:
    """Whether nobody has described a kind's transformer."""
    return class_of(kind).startswith(_UNSEEN)


CACHED = [kind for kind in KINDS if is_cached(kind)]
UNSEEN = [kind for kind in CACHED if is_unseen(kind)]
REFUSED = [kind for kind in KINDS if not is_cached(kind)]


def first_of_each_family() -> list[Kind]:
    """One kind of each family: that with guidance, where there is one."""
    found: dict[str, Kind] = {}
    for known in KNOWN:
        mine = [kind for kind in CACHED if class_of(kind) in known.pipelines]
        # Of some there is no pipeline but modular ones.
        modular = [kind for kind in CACHED if kind.family == known.name]
        if mine or modular:
            found[known.name] = (mine or modular)[0]
    return list(found.values())


def named(kinds: list[Kind]) -> Callable[..., pytest.MarkDecorator]:
    """Run a test for each kind."""
    return pytest.mark.parametrize("kind", kinds, ids=[kind.name for kind in kinds])


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest."""
    assert first.shape == second.shape
    return float((first.double() - second.double()).abs().max())
