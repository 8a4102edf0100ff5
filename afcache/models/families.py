"""All families that are cached, and how to find one's own."""

from typing import Any

from afcache.functional.model import Architecture
from afcache.models.family import Family
from afcache.models.flux1.family import FLUX1

FAMILIES: tuple[Family, ...] = (FLUX1,)


def family_of(transformer: Any) -> Family:
    """The family of a transformer; its own checks refuse what it cannot take.

    Raises:
        NotImplementedError: none knows it; the message names those that are known.

    """
    for family in FAMILIES:
        if isinstance(transformer, family.transformer):
            return family
    known = ", ".join(f"{family.transformer.__name__} ({family.name})" for family in FAMILIES)
    raise NotImplementedError(
        f"transformer is a {type(transformer).__name__}; only diffusers' {known} is supported. "
        "If torch.compile wrapped it, take it out, because compile_pipeline compiles it: pipe.transformer = "
        "pipe.transformer._orig_mod."
    )


def family_with(architecture: Architecture) -> Family | None:
    """The family whose architecture this is, or None."""
    return next((family for family in FAMILIES if family.architecture is architecture), None)


def check_pipeline(pipe: Any) -> None:
    """Raise unless a pipeline is of a kind that is cached.

    Raises:
        NotImplementedError: the message lists those that are.

    """
    known = [kind for family in FAMILIES for kind in family.pipelines]
    if not isinstance(pipe, tuple(known)):
        raise NotImplementedError(
            f"pipe is a {type(pipe).__name__}; supported pipelines are {', '.join(kind.__name__ for kind in known)}. Run this "
            "one without afcache."
        )
