"""How a transformer's computed steps are run: traced with the step, or called as the host runs them."""

import dataclasses
from typing import Any

from diffusers.utils import logging

from afcache.models.family import Family
from afcache.runtime.compiled import CompileOptions
from afcache.runtime.host import sharing_of

logger = logging.get_logger(__name__)
# Modular pipelines' guiders that skip layers or perturb attention at some of their calls.
_HOOKING_GUIDERS = ("SkipLayerGuidance", "PerturbedAttentionGuidance", "AutoGuidance", "SmoothedEnergyGuidance")


def choose_mode(
    options: CompileOptions, transformer: Any, family: Family, pipe: Any, *, asked: bool | str, forecasts_output: bool
) -> CompileOptions:
    """How a transformer is compiled: where its forward cannot be traced whole, computed steps are called.

    Args:
        options: as they were asked for.
        transformer: the host's.
        family: its family.
        pipe: which may have a guider that changes the model's layers between calls.
        asked: what `compile` was.
        forecasts_output: whether the settings leave the model's inside alone.

    Raises:
        NotImplementedError: one graph was asked for by name.

    """
    if family.calls.confirm is not None:
        # What nobody described is looked at when it is called.
        return dataclasses.replace(options, keeps_host=True)
    kind, guider = type(transformer).__name__, type(getattr(pipe, "guider", None)).__name__
    if sharing_of(transformer) is not None and forecasts_output:
        # Where nothing is compiled, too: a hook of the model itself may share out its inputs.
        reason = f"{kind} shares its work out among processes (enable_parallelism)"
    elif not options.enabled:
        return options
    elif guider in _HOOKING_GUIDERS:
        reason = f"{kind} under {guider} cannot be traced whole"
    elif not family.traces(transformer):
        reason = f"{kind} cannot be traced whole"
    else:
        return options
    if options.keeps_host:
        return options
    if asked == "step":
        raise NotImplementedError(
            f"compile='step' asks for one graph, and {reason}. Leave compile out, or pass compile='blocks', which runs the "
            "model's own forward at computed steps."
        )
    logger.warning(f"{reason}, so computed steps are its own forward (compile='blocks'). Images are the same.")
    return dataclasses.replace(options, keeps_host=True)
