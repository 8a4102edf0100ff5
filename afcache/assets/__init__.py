"""The small trained pipelines that ship with the package: mini-FLUX draws pictures, mini-Wan videos."""

import json
from pathlib import Path
from typing import Any

from afcache._checks import show

_SIZES = ("height", "width", "num_frames", "max_sequence_length", "num_inference_steps")
_SCALES = ("true_cfg_scale", "guidance_scale")


def mini_flux_folder() -> Path:
    """The folder of mini-FLUX, in diffusers' layout."""
    return Path(__file__).parent / "mini_flux"


def mini_wan_folder() -> Path:
    """The folder of mini-Wan, in diffusers' layout."""
    return Path(__file__).parent / "mini_wan"


def shipped() -> dict[str, Path]:
    """The folders of all that ship, by the names that the command line has for them."""
    return {"mini-flux": mini_flux_folder(), "mini-wan": mini_wan_folder()}


def recommended_settings(folder: str | Path) -> dict[str, Any]:
    """What is stored beside a model, of size (pixels), frames, steps, max_sequence_length (text tokens) and guidance.

    Args:
        folder: of the model; nothing is recommended where it has no `recommended.json`.

    Raises:
        ValueError: the file is no JSON object, or a value is out of its range.

    """
    path = Path(folder) / "recommended.json"
    if not path.is_file():
        return {}
    cure = "Mend the file, or remove it: it only spares options of the command line."
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file of recommended settings: {error}. {cure}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be an object of {', '.join((*_SIZES, *_SCALES))}, got {show(settings)}. {cure}")
    known = {name: value for name, value in settings.items() if name in (*_SIZES, *_SCALES)}
    for name, value in known.items():
        is_number = isinstance(value, int if name in _SIZES else int | float) and not isinstance(value, bool)
        if not is_number or not 1 <= value < float("inf"):
            kind = "a whole number" if name in _SIZES else "a finite number"
            raise ValueError(f"{path}: {name} must be {kind} >= 1, got {show(value)}. {cure}")
    return known
