"""Loading the pipeline of the command line, whole or not at all."""

import argparse
from typing import TYPE_CHECKING, Any

from afcache.cli.silence import quiet_imports

if TYPE_CHECKING:
    import torch

    from afcache.cli.outline import Outline

_CURE = "Download the model again, or mend its files."
_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError)


def load_pipeline(found: "Outline", arguments: argparse.Namespace, device: "torch.device") -> Any:
    """Load the weights; bfloat16 on CUDA but for mini-FLUX, if no dtype is given.

    Raises:
        ValueError: a part cannot be loaded, or its config and its weights disagree: diffusers would fill up what is missing
            with random numbers, and leave out what is unknown.

    """
    with quiet_imports():
        import torch
        from diffusers import DiffusionPipeline, ModelMixin
        from transformers import PreTrainedModel

    model = found.model
    default = "bfloat16" if device.type == "cuda" and not model.is_mini else "float32"
    dtype = getattr(torch, arguments.dtype or default)
    kinds = {name: kind for name, kind in found.kinds.items() if issubclass(kind, ModelMixin | PreTrainedModel)}
    # What they warn of is refused below.
    with quiet_imports():
        parts = {name: _load_part(model.name, name, kind, dtype) for name, kind in kinds.items()}
        try:
            pipe: Any = DiffusionPipeline.from_pretrained(model.name, dtype=dtype, **{**dict.fromkeys(model.absent), **parts})
        except _ERRORS as error:
            raise ValueError(f"--model {model.name!r} could not be loaded: {_first_line(error)}. {_CURE}") from error
    pipe = pipe.to(device)
    # None: a bar on a terminal, and none in a file.
    pipe.set_progress_bar_config(desc="denoising", leave=False, disable=None)
    return pipe


def _load_part(model: str, name: str, kind: Any, dtype: "torch.dtype") -> Any:
    try:
        part, found = kind.from_pretrained(model, subfolder=name, dtype=dtype, output_loading_info=True)
    except _ERRORS as error:
        raise ValueError(f"--model {model!r}: {name} could not be loaded: {_first_line(error)}. {_CURE}") from error
    missing, unknown = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if kind.__module__.startswith("transformers."):
        # Files of theirs hold tied weights once, and parts that the pipeline does without.
        missing, unknown = [key for key in missing if not key.endswith("embed_tokens.weight")], []
    if missing or unknown:
        examples = ", ".join(keys[0] for keys in (missing, unknown) if keys)
        raise ValueError(
            f"--model {model!r}: {name}/config.json and the weights beside it disagree: {len(missing)} weights are missing and "
            f"{len(unknown)} are unknown ({examples}). {_CURE}"
        )
    return part


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
