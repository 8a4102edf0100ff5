"""All families that are cached, and how to find one's own."""

from typing import Any

from afcache.functional.model import Architecture
from afcache.models.family import Family, Known
from afcache.models.flux1.family import FLUX1
from afcache.models.flux1.family import KNOWN as KNOWN_FLUX1
from afcache.models.hosted.table import HOSTED
from afcache.models.hosted.unseen import is_candidate, unseen_family

KNOWN: tuple[Known, ...] = (KNOWN_FLUX1, *HOSTED)


# Where pipelines keep transformers: of some, experts for high and for low noise, one for the prompt and one without, or one for
# references.
_PLACES = ("transformer", "transformer_2", "unconditional_transformer", "transformer_ref")


def transformers_of(pipe: Any) -> list[Any]:
    """All transformers of a pipeline that draw."""
    found = (getattr(pipe, name, None) for name in _PLACES)
    return [transformer for transformer in found if transformer is not None]


def draws_videos(pipe: Any) -> bool:
    """Whether a pipeline draws videos: diffusers' then have what turns tensors into frames, modular ones that decode, too."""
    return getattr(pipe, "video_processor", None) is not None


def family_of(transformer: Any) -> Family:
    """The family of a transformer; its own checks refuse what it cannot take.

    Raises:
        NotImplementedError: none knows it; the message names those that are known.

    """
    known = _find(transformer)
    if known is None and is_candidate(transformer):
        return unseen_family(type(transformer))
    return _known(transformer).family(type(transformer))


def family_with(architecture: Architecture) -> Family | None:
    """The family whose architecture this is, of those whose inside is known; or None."""
    return FLUX1 if architecture is FLUX1.architecture else None


def check_pipeline(pipe: Any) -> None:
    """Raise unless a pipeline is of a kind that is cached: known, modular around a known transformer, or never seen.

    Raises:
        NotImplementedError: the message lists those that are.
        ValueError: it has no transformer.

    """
    names, transformers = _names(pipe), transformers_of(pipe)
    # Two of which nobody knows how they are joined are refused below.
    is_unseen = len(transformers) == 1 and _find(transformers[0]) is None and is_candidate(transformers[0])
    is_modular = "ModularPipeline" in names and bool(transformers) and all(map(_find, transformers))
    if is_unseen or is_modular:
        return
    if not any(names & set(known.pipelines) for known in KNOWN):
        of_transformer = names_of_pipelines(next(iter(transformers), None)) or ("modular ones around its transformer",)
        raise NotImplementedError(
            f"pipe is a {type(pipe).__name__}; supported pipelines are {', '.join(of_transformer)}. Run this one without "
            "afcache."
        )
    if not transformers:
        raise ValueError(f"pipe is a {type(pipe).__name__} whose transformer is None. Load it with one: pipe.transformer = ...")


def names_of_pipelines(transformer: Any) -> tuple[str, ...]:
    """Classes of pipelines that are cached with a transformer; with any, where it is of no known family."""
    mine = [known for known in KNOWN if _names(transformer) & set(known.transformers)]
    return tuple(name for known in mine or KNOWN for name in known.pipelines)


def _find(transformer: Any) -> Known | None:
    names = _names(transformer)
    return next((known for known in KNOWN if names & set(known.transformers)), None)


def _known(transformer: Any) -> Known:
    known = _find(transformer)
    if known is not None:
        return known
    families = ", ".join(f"{'/'.join(known.transformers)} ({known.name})" for known in KNOWN)
    raise NotImplementedError(
        f"transformer is a {type(transformer).__name__}; only diffusers' {families} is supported. "
        "If torch.compile wrapped it, take it out, because compile_pipeline compiles it: pipe.transformer = "
        "pipe.transformer._orig_mod."
    )


def _names(thing: Any) -> set[str]:
    """Of a thing's class and of those that it is derived from: diffusers' own are imported by nobody but their users."""
    return {kind.__name__ for kind in type(thing).__mro__}
