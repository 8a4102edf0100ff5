"""Rows of the tables of `bench/full_size.py --gpu`: what stands where nothing was measured, and entries of their own kind."""

from typing import Any

from torch import Tensor

from bench.models.random_flux import Size

UNKNOWN = "not measured"
# What a cached step costs does not depend on blocks that it does not run, so variants are compiled with few.
FEW = Size(0, 1, 1, 0)

Row = dict[str, Any]
STEP: Row = {
    "contender": "",
    "decisions": "-",
    **dict.fromkeys(("first call (s)", "of the plain model's", "plain step or refresh (ms)", "cached step (ms)"), "-"),
    **dict.fromkeys(("cached / refresh (%)", "speed-up", "promised", "efficiency", "image (s)"), "-"),
    "waits of a step": "-",
    "MiB over plain": "-",
    "pattern": "-",
    "note": "",
}
VARIANT: Row = {
    **dict.fromkeys(("pixels", "batch", "mode", "decisions", "first call (s)", "plain step, all blocks (ms)"), "-"),
    **dict.fromkeys(("cached step (ms)", "cached / plain (%)", "image (s)", "waits of a step", "pattern"), "-"),
    "note": "",
}
EQUALITY: Row = {"ours": "", "theirs": "", "largest difference": "-", "largest value": "-", "relative L2": "-", "note": ""}


def at_most(waits: list[int]) -> str:
    """Of the first step, which reads the schedule, and of all others."""
    return f"{max(waits[1:])} (first {waits[0]})"


def difference(ours: Tensor, theirs: Tensor) -> Row:
    """How far two results are apart."""
    gap, exact = ours.float() - theirs.float(), theirs.float()
    return {
        "largest difference": float(gap.abs().max()),
        "largest value": float(exact.abs().max()),
        "relative L2": float(gap.norm() / exact.norm()),
    }
