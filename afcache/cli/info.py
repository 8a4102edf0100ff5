"""`afcache info`: versions, and what can be used on this machine."""

import importlib.metadata
import platform

import torch

from afcache._version import __version__
from afcache.cli.device import missing_compiler
from afcache.cli.silence import quiet_imports

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
