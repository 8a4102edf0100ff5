"""What is refused of any transformer."""

from afcache._typing import HostModule


def check_cache(transformer: HostModule) -> None:
    """Raise where a cache of diffusers is on, which would take our computed steps for its own.

    Raises:
        NotImplementedError: it is.

    """
    if getattr(transformer, "is_cache_enabled", False):
        raise NotImplementedError(
            "transformer already has a diffusers cache enabled. Call transformer.disable_cache() before compile_pipeline."
        )
