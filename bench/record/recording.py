"""Writing results: a table for people and the same rows as JSON, with everything needed to repeat them."""

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

RESULTS = Path(__file__).parent.parent / "results"
_STARTED = time.monotonic()


def environment() -> dict[str, Any]:
    """Commit, command, versions, machine, and minutes that it took until now."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", ":!bench/results")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores, {_processor()}"
    return {
        "commit": commit + (" with uncommitted changes" if changed else ""),
        "command": " ".join(["python", _started(), *map(shlex.quote, sys.argv[1:])]),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "python": platform.python_version(),
        "device": device,
        "threads": torch.get_num_threads(),
        "minutes": round((time.monotonic() - _STARTED) / 60, 1),
    }


def write_result(
    name: str,
    title: str,
    rows: list[dict[str, Any]],
    *,
    notes: list[str],
    folder: Path = RESULTS,
    shown: list[dict[str, Any]] | None = None,
) -> Path:
    """Write `name.md` and `name.json`; return the table's path.

    Args:
        name: file name without extension, `<subject>_<device>_<yyyymm>`.
        title: heading.
        rows: the table, one dict a row, all with the same keys; floats are shown with three digits.
        notes: what a reader must know, one line each.
        folder: where to.
        shown: rows of the readable table, if they are others than the JSON's.

    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = environment()
    (folder / f"{name}.json").write_text(json.dumps({**facts, "notes": notes, "rows": rows}, indent=2) + "\n")
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in facts.items()), "", *notes, "", table(shown or rows), ""]
    path = folder / f"{name}.md"
    path.write_text("\n".join(lines))
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(_show(row[key]) for key in keys) + " |" for row in rows]
    return "\n".join(lines)


def _show(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1
        else f"{value:.2f}"
        if isinstance(value, float)
        else str(value)
    )


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def _started() -> str:
    """What came after "python": a module, or a file."""
    spec = sys.modules["__main__"].__spec__
    return sys.argv[0] if spec is None else f"-m {spec.name}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
