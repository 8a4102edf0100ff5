"""The pages that a reader of the project finds."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def pages() -> list[Path]:
    """README, everything below docs, and the READMEs of the benchmarks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "bench").rglob("README.md"))]
