"""Calls in which video, audio and conditions are rows of one sequence, each with a timestep of its own (MiniMax-H3).

`timestep [levels]` holds the different ones, `timestep_indices [seq]` says which is a row's, `video_indices` and
`audio_indices` where in the sequence the rows of each kind are, conditions first.
"""

from typing import Any

import torch
from torch import Tensor

from afcache._typing import HostModule
from afcache.models.hosted.samples import Cut, Cuts

# The sample's, what is beside it, and the conditions' of each.
_LEVELS = 4


def of_last_row(arguments: dict[str, Any]) -> Tensor:
    """The sample's timestep, `[1]`: its rows are the last of their kind."""
    place = arguments["timestep_indices"].index_select(0, arguments["video_indices"][-1:])
    return arguments["timestep"].index_select(0, place)


def with_all_levels(arguments: dict[str, Any]) -> dict[str, Any]:
    """As many timesteps at every step: where some are equal pipelines leave them out, as at the first, where all is noise."""
    timestep = arguments["timestep"]
    missing = max(_LEVELS - len(timestep), 0)
    return {**arguments, "timestep": torch.cat([timestep, timestep[-1:].expand(missing)])}


def after_conditions(transformer: HostModule, arguments: dict[str, Any]) -> Cuts:
    """Rows of conditions come first, at another timestep than what is drawn; waits for the device."""
    del transformer
    video = _after_conditions(arguments, "video_indices", "hidden_states", is_beside=False)
    return video + _after_conditions(arguments, "audio_indices", "audio_hidden_states", is_beside=True)


def _after_conditions(arguments: dict[str, Any], indices: str, sample: str, *, is_beside: bool) -> Cuts:
    levels = arguments["timestep_indices"][arguments[indices]]
    given = int((levels != levels[-1]).sum())
    return (Cut(1, given, arguments[sample].shape[1] - given, is_beside=is_beside),) if given else ()
