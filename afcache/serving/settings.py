"""Which settings requests that share calls can have."""

from afcache.settings.changes import at_tolerance
from afcache.settings.config import CacheConfig


def check_foreseeable(settings: CacheConfig) -> None:
    """Raise unless it is known before a step which requests compute it.

    Raises:
        NotImplementedError: the policy decides within the step, by groups, or for a batch as a whole.

    """
    if settings.rule.is_gated or settings.layerwise is not None or settings.batch_decisions != "independent":
        raise NotImplementedError(
            f"a Batcher must know before a step which requests compute it, and policy {settings.policy!r} with "
            f"layerwise={settings.layerwise!r} and batch_decisions={settings.batch_decisions!r} does not tell. Use "
            "'adaptive', 'fixed', 'growing' or 'planned', decided for each image by itself."
        )


def settings_of(settings: CacheConfig, tolerance: float | None) -> CacheConfig:
    """Those of a request.

    Args:
        settings: the batcher's.
        tolerance: the request's own, or None.

    Raises:
        ValueError: it is out of its range, or nothing is measured that it could bound.

    """
    if tolerance is None:
        return settings
    if not settings.rule.is_error_controlled:
        raise ValueError(
            f"tolerance must be None under policy {settings.policy!r}, whose refreshes are known beforehand, got "
            f"{tolerance!r}. Make the Batcher with policy 'adaptive'."
        )
    return at_tolerance(settings, tolerance)
