"""Where the sample is in the calls of each kind of pipeline."""

import math
from typing import Any

from torch import Tensor

from afcache._typing import HostModule
from afcache.models.hosted.samples import Cut, Cuts


def first_channels(transformer: HostModule, arguments: dict[str, Any]) -> Cuts:
    """Conditions are appended to the channels: the sample has as many as the model returns."""
    channels = transformer.config.out_channels
    return (Cut(1, 0, channels, is_returned=False),) if arguments["hidden_states"].shape[1] > channels else ()


def before_variances(transformer: HostModule, arguments: dict[str, Any]) -> Cuts:
    """The output's second half of channels are variances, which pipelines throw away."""
    channels = arguments["hidden_states"].shape[1]
    beyond = transformer.config.out_channels - channels
    return (Cut(1, 0, channels, beyond=beyond),) if beyond else ()


def first_channels_of_frames(transformer: HostModule, arguments: dict[str, Any]) -> Cuts:
    """Conditions are appended to the channels, which come after the frames."""
    channels = transformer.config.out_channels
    return (Cut(2, 0, channels, is_returned=False),) if arguments["hidden_states"].shape[2] > channels else ()


def before_references(transformer: HostModule, arguments: dict[str, Any]) -> Cuts:
    """Reference images are appended to the tokens: the first of their positions' numbers differs from the first token's."""
    del transformer
    ids: Tensor = arguments["img_ids"]
    kinds = (ids if ids.ndim == 2 else ids[0])[:, 0]
    count = int((kinds == kinds[0]).sum())
    return (Cut(1, 0, count),) if count < len(kinds) else ()


def listed_shapes(transformer: HostModule, arguments: dict[str, Any]) -> Cuts:
    """`img_shapes` lists frames, height and width of the sample, then of references; of layers all but the last."""
    shapes = arguments["img_shapes"]
    of_first = shapes[0] if isinstance(shapes[0], list) else shapes[:1]
    of_sample = of_first[:-1] if getattr(transformer.config, "use_layer3d_rope", False) else of_first[:1]
    count = sum(map(math.prod, of_sample))
    return (Cut(1, 0, count),) if count < arguments["hidden_states"].shape[1] else ()


def after_references(transformer: HostModule, arguments: dict[str, Any]) -> Cuts:
    """`img_shapes` lists references, then the sample: its tokens are the last, of an output that holds words as well, too."""
    del transformer
    count = math.prod(arguments["img_shapes"][0][-1])
    return (Cut(1, -count, count),)


def after_given_frames(transformer: HostModule, arguments: dict[str, Any]) -> Cuts:
    """The first frame is given where its tokens have timestep 0; conditions may be appended to the channels."""
    timestep: Tensor = arguments["timestep"]
    channels = first_channels(transformer, arguments)
    is_given = timestep.ndim > 1 and float(timestep[0].flatten()[0]) == 0
    return channels + later_frames(arguments["hidden_states"]) if is_given else channels


def later_frames(latents: Tensor, axis: int = 2) -> Cuts:
    """All frames but the first."""
    return (Cut(axis, 1, latents.shape[axis] - 1),) if latents.shape[axis] > 1 else ()


def frames_by_settings(transformer: HostModule, arguments: dict[str, Any]) -> Cuts:
    """The first frame is given, or conditions are appended to the channels, as the model was trained."""
    if getattr(transformer.config, "image_condition_type", None) == "token_replace":
        return later_frames(arguments["hidden_states"])
    return first_channels(transformer, arguments)


def marked_frames(transformer: HostModule, arguments: dict[str, Any]) -> Cuts:
    """Channels come last: the sample's, a condition's, and a mask that is 1 where the first frame is given."""
    x, channels = arguments["hidden_states"], transformer.config.out_visual_dim
    if x.shape[-1] == channels:
        return ()
    is_given = x.shape[1] > 1 and bool((x[:, 0, ..., -1] == 1).all())
    return (Cut(-1, 0, channels, is_returned=False), *(later_frames(x, 1) if is_given else ()))
