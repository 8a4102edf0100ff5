"""The device that draws, and the compiler that it needs."""

import os
import shlex
import shutil

import torch


def choose_device(name: str | None) -> torch.device:
    """The device that was asked for; else CUDA if there is one.

    Raises:
        ValueError: there is no such device here.

    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is not a device; try cpu, cuda or cuda:0.") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name!r} is not supported; use cpu or cuda.")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise ValueError(
            f"--device {name!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices. Use --device cpu."
        )
    return device


def missing_compiler(device: torch.device) -> str | None:
    """The reason why torch.compile cannot work here, or None. On a CPU inductor needs a C++ compiler."""
    name = (shlex.split(os.environ.get("CXX", "")) or ["g++"])[0]
    if device.type != "cpu" or shutil.which(name):
        return None
    return (
        f"no C++ compiler: {name!r} is not on the PATH, and torch.compile needs one. Install g++, set CXX, or use --no-compile."
    )
