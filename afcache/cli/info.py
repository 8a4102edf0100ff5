"""`afcache info`: versions and what can be used on this machine, or what is known of a model."""

import importlib.metadata
import platform
from typing import TYPE_CHECKING

import torch

from afcache._version import __version__
from afcache.cli.device import missing_compiler
from afcache.cli.model import resolve_model
from afcache.cli.options import makes_video, options_of
from afcache.cli.silence import quiet_imports

if TYPE_CHECKING:
    from afcache.cli.outline import Outline

_LIBRARIES = ("torch", "diffusers", "transformers", "xfuser", "einops", "jaxtyping", "beartype")


def collect_info() -> dict[str, str]:
    """Versions, device, compiler, and whether several GPUs can be used; for people and for bug reports."""
    info = {"afcache": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in _LIBRARIES:
        try:
            info[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            info[name] = "not installed"
    if torch.cuda.is_available():
        info["device"] = f"cuda ({torch.cuda.get_device_name()}, {torch.cuda.device_count()} in all)"
    else:
        info["device"] = f"cpu ({torch.get_num_threads()} threads); no CUDA device"
    info["compiler"] = missing_compiler(torch.device("cpu")) or "found"
    info["several GPUs"] = _several_gpus()
    return info


def _several_gpus() -> str:
    """Whether xfuser can be used, in one line; it cannot be imported where there is no GPU, and that is nobody's fault."""
    if not torch.cuda.is_available():
        return "none on this machine, nothing is missing; several CPU processes can draw together (--device cpu)"
    try:
        with quiet_imports():
            import xfuser  # noqa: F401
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"xfuser cannot be imported: {reason}; one GPU works without it"
    return f"yes, {torch.cuda.device_count()} through xfuser"


def describe_model(name: str) -> dict[str, str]:
    """What the configs of a pipeline tell: what it is, whether and how it is cached, and what the command does with it.

    Raises:
        ValueError: there is no such pipeline, or its files cannot be read.

    """
    model = resolve_model(name)
    with quiet_imports():
        from afcache.cli.outline import check_cached, outline

    found = outline(model)
    info = {"model": model.name, "pipeline": model.pipeline, "transformer": _transformers(found)}
    try:
        check_cached(found)
    except (NotImplementedError, ValueError) as error:
        return {**info, "cached": f"no: {' '.join(str(error).split())}"}
    called = "computed steps are the model's own forward, which cannot be one graph (compile='blocks')"
    return {
        **info,
        "cached": f"yes, as {found.family.name}",
        "compiled": called if found.is_called else "the whole step, as one graph (compile='step')",
        "guidance": _guidance(found),
        "several GPUs": "yes, with torchrun" if found.shared_heads else "no: one process draws",
        "the command": _drawing(found),
    }


def _transformers(found: "Outline") -> str:
    from afcache.cli.outline import count_blocks

    counted = [f"{type(each).__name__} ({count_blocks(each)} blocks)" for each in found.transformers]
    return " and ".join(counted) or "none"


def _guidance(found: "Outline") -> str:
    """Which scales the pipeline's call takes, and what they do."""
    kinds = []
    if "true_cfg_scale" in found.call:
        kinds.append(f"true_cfg_scale, classifier-free (default {found.call['true_cfg_scale']}), with a negative prompt")
    if "guidance_scale" in found.call and found.embeds_guidance:
        kinds.append(f"guidance_scale, an input of the transformer (default {found.call['guidance_scale']})")
    elif "guidance_scale" in found.call and "true_cfg_scale" not in found.call:
        kinds.append(f"guidance_scale, classifier-free (default {found.call['guidance_scale']})")
    if hasattr(found.pipe, "guider"):
        kinds.append(f"a guider of the pipeline's, {type(found.pipe.guider).__name__}")
    return "; ".join(kinds) or "none that can be set"


def _drawing(found: "Outline") -> str:
    from afcache.cli.outline import check_text_alone

    try:
        check_text_alone(found)
    except ValueError as error:
        return f"no: {error}"
    options = ", ".join(options_of(found.call, embeds_guidance=found.embeds_guidance))
    return f"draws {'videos' if makes_video(found.call) else 'pictures'}, with {options}"
