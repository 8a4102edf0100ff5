"""The model of the command line: found, and its files read, before any weight is loaded."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afcache._checks import show
from afcache.assets import mini_flux_folder, shipped
from afcache.cli.silence import quiet_imports


@dataclass(frozen=True)
class Model:
    """A pipeline that was found.

    Attributes:
        name: folder or hub id.
        index: what its model_index.json says: its class, and the library and class of each part.

    """

    name: str
    index: dict[str, Any]

    @property
    def is_mini(self) -> bool:
        """Whether it is one of those that ship with the package."""
        return self.name in map(str, shipped().values())

    @property
    def pipeline(self) -> str:
        """The name of its class."""
        return self.index["_class_name"]

    @property
    def parts(self) -> dict[str, tuple[str, str]]:
        """Library and class of each part that is there, by the part's name."""
        return {name: (entry[0], entry[1]) for name, entry in self._entries() if None not in entry}

    @property
    def absent(self) -> list[str]:
        """Names of parts that are not there, and need not be."""
        return [name for name, entry in self._entries() if None in entry]

    def _entries(self) -> list[tuple[str, list[Any]]]:
        pairs = self.index.items()
        return [
            (name, entry) for name, entry in pairs if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2
        ]


def resolve_model(name: str | None) -> Model:
    """The pipeline of a folder or hub id, or one that ships with the package; None is mini-FLUX.

    Raises:
        ValueError: there is none, or the hub cannot be reached.

    """
    name = str(mini_flux_folder() if name is None else shipped().get(name, name))
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not os.path.exists(name)
    if not is_hub_id and not os.path.isdir(name):
        raise ValueError(
            f"--model {name!r}: no such folder (a hub id looks like black-forest-labs/FLUX.1-dev; "
            f"{' and '.join(shipped())} are built in)."
        )
    if not is_hub_id and (Path(name) / "modular_model_index.json").is_file():
        raise ValueError(
            f"--model {name!r} is a modular pipeline, which the command does not draw with. In Python, compile_pipeline "
            "takes it (docs/compatibility.md)."
        )
    if not is_hub_id and not (Path(name) / "model_index.json").is_file():
        raise ValueError(f"--model {name!r} has no model_index.json: it is not a diffusers pipeline folder.")
    index = _load_config(name, "") if is_hub_id else _read_config(name, "model_index.json")
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ValueError(
            f"--model {name!r}: model_index.json must be an object whose _class_name names a pipeline of diffusers, got "
            f"{show(index)}. Download the model again, or mend the file."
        )
    return Model(name, index)


def part_config(model: Model, part: str, *needed: str) -> dict[str, Any]:
    """The configuration of a part of the pipeline that is a model of diffusers, read without its weights.

    Args:
        model: the pipeline.
        part: its name, such as "transformer" or "vae".
        needed: entries that it must have.

    Raises:
        ValueError: the model has none that can be read, or that lacks one of these.

    """
    is_folder = os.path.isdir(model.name)
    config = _read_config(model.name, f"{part}/config.json") if is_folder else _load_config(model.name, part)
    missing = [entry for entry in needed if not isinstance(config, dict) or entry not in config]
    if missing or not isinstance(config, dict):
        raise ValueError(
            f"--model {model.name!r}: {part}/config.json must be an object with {', '.join(needed) or 'settings'}, got "
            f"{show(config)}. Download the model again, or mend the file."
        )
    return config


def _read_config(folder: str, name: str) -> Any:
    """A file of a model's folder, as it is, without diffusers, which takes seconds to import."""
    try:
        return json.loads((Path(folder) / name).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {folder!r}: {name} cannot be read: {error}") from error


def _load_config(model: str, part: str) -> Any:
    """The same from the Hugging Face hub; the pipeline's own for no part."""
    with quiet_imports():
        from diffusers import AutoModel, DiffusionPipeline

    try:
        # Warnings tell of every attempt to reach the hub; what came of them is in the error.
        with quiet_imports():
            return AutoModel.load_config(model, subfolder=part) if part else DiffusionPipeline.load_config(model)
    except OSError as error:
        if _is_unreachable(error):
            raise ValueError(
                f"--model {model!r} is a hub id, and the Hugging Face hub cannot be reached; nor is the model kept on this "
                "machine. Go online, or give the folder of a pipeline that was downloaded."
            ) from error
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"--model {model!r} could not be loaded from the Hugging Face hub: {first}") from error


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether there was no connection; diffusers says then that the model has no such file."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | ConnectionError):
            return True
        error = error.__cause__ or error.__context__
    return False
