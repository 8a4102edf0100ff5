"""mini-FLUX: a small trained FluxPipeline that ships with the package."""

import json
from pathlib import Path
from typing import Any


def mini_flux_folder() -> Path:
    """The folder of mini-FLUX, in diffusers' layout."""
    return Path(__file__).parent / "mini_flux"


def recommended_settings(folder: Path) -> dict[str, Any]:
    """Height, width (pixels), max_sequence_length (text tokens) and true_cfg_scale stored beside a model, if they are."""
    path = folder / "recommended.json"
    return json.loads(path.read_text()) if path.is_file() else {}
