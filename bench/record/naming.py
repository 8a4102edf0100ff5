"""What result files are called: `<subject>_<device>_<yyyymm>`, a part of them with its name behind."""

import re
from datetime import UTC, datetime
from pathlib import Path

import torch

BENCH = Path(__file__).resolve().parent.parent
RESULTS = BENCH / "results"
# What a later run goes on from, and nobody reads: git ignores it.
RUNS = BENCH / "runs"
_MAKERS = {"nvidia", "tesla", "geforce", "quadro", "amd", "instinct", "radeon"}


def device_kind(device: torch.device | str) -> str:
    """`cpu`, or a GPU's short name such as `h100`."""
    device = torch.device(device)
    return short_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def short_name(name: str) -> str:
    """Of a GPU's whole name the model: `NVIDIA H100 80GB HBM3` is h100, `NVIDIA GeForce RTX 4090` is rtx4090."""
    words = [word for word in re.split(r"[\s-]+", name.lower()) if word and word not in _MAKERS]
    for before, word in zip(["", *words], words, strict=False):
        if any(character.isdigit() for character in word):
            return re.sub(r"[^a-z0-9]", "", before + word if word.isdigit() else word)
    return "gpu"


def result_path(
    subject: str, suffix: str, *, device: torch.device | str | None = "cpu", part: str = "", folder: Path = RESULTS
) -> Path:
    """Where a result of this month, on this device, belongs.

    Args:
        subject: what was measured, in words joined by underscores.
        suffix: `.json`, `.md` or `.png`.
        device: that it was measured on; None for what is counted by shapes, and depends on no device and no month.
        part: of a result of several files; "" for the first of them.
        folder: of all results.

    """
    origin = "" if device is None else f"_{device_kind(device)}_{datetime.now(UTC):%Y%m}"
    return folder / f"{subject}{origin}{part and '_'}{part}{suffix}"


def newest_result(subject: str, *, kind: str | None = "cpu", part: str = "", folder: Path = RESULTS) -> Path:
    """The JSON that was written last for a subject.

    Args:
        subject, part, folder: as `result_path` has them.
        kind: of the device, as file names have it; None for what is counted by shapes.

    Raises:
        FileNotFoundError: there is none.

    """
    origin = "" if kind is None else rf"_{re.escape(kind)}_(\d{{6}})"
    name = re.compile(f"{re.escape(subject)}{origin}{part and '_'}{re.escape(part)}")
    found = sorted(path for path in folder.glob(f"{subject}*.json") if name.fullmatch(path.stem))
    if not found:
        which = f"{subject!r}{f', part {part!r},' if part else ''}{'' if kind is None else f' on {kind}'}"
        raise FileNotFoundError(f"{folder} holds no result of {which}: run its benchmark first.")
    return found[-1]
