"""Writing results: the rows with everything needed to repeat them as JSON, and the table for people made of it."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.record.naming import RESULTS, result_path
from bench.record.render import render

_STARTED = time.monotonic()


def environment(device: torch.device | str | None = "cpu") -> dict[str, Any]:
    """Commit, command, versions, machine, and minutes that it took until now."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return {
        "commit": commit + (" with uncommitted changes" if changed else ""),
        "command": " ".join(["python", _started(), *map(shlex.quote, sys.argv[1:])]),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "python": platform.python_version(),
        "device": _machine(torch.device(device or "cpu")),
        "threads": torch.get_num_threads(),
        "minutes": round((time.monotonic() - _STARTED) / 60, 1),
    }


def write_result(
    subject: str,
    title: str,
    rows: list[dict[str, Any]],
    *,
    notes: list[str],
    shown: list[dict[str, Any]] | None = None,
    device: torch.device | str | None = "cpu",
    part: str = "",
    folder: Path = RESULTS,
) -> Path:
    """Write `<subject>_<device>_<yyyymm>.json`, and the `.md` that it renders to; return the table's path.

    Args:
        subject: what was measured, in words joined by underscores.
        title: heading.
        rows: the table, one dict a row, all with the same keys where they are shown; floats are shown with three digits.
        notes: what a reader must know, one line each.
        shown: rows of the readable table, if they are others.
        device: that it was measured on; None for what is counted by shapes, whose file has the subject's name alone.
        part: name of a further file of the same result.
        folder: where to.

    """
    folder.mkdir(parents=True, exist_ok=True)
    result = {"title": title, **environment(device), "notes": notes, "rows": rows}
    if shown is not None:
        result["shown"] = shown
    path = result_path(subject, ".json", device=device, part=part, folder=folder)
    _replace(path, json.dumps(result, indent=2) + "\n")
    readable = path.with_suffix(".md")
    # Of what is stored, so that rendering it again gives the same.
    _replace(readable, render(json.loads(path.read_text())))
    return readable


def _replace(path: Path, text: str) -> None:
    """Write a file at once: a process that is ended on its way leaves the one before."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def _started() -> str:
    """What came after "python": a module, or a file."""
    spec = sys.modules["__main__"].__spec__
    return sys.argv[0] if spec is None else f"-m {spec.name}"


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {os.cpu_count()} cores, {_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
