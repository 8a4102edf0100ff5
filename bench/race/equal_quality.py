"""Who is fastest at equal quality: compiled contenders over the compiled pipeline, eager ones over the eager pipeline."""

import itertools
from typing import Any

from bench.search.curves import Point, speed_at

QUALITIES = (40, 35)
_MODES = ("compiled", "eager")
_KINDS = {"AFCache": "ours", "fastest peer": "peer", "fewer steps": "control"}
_NOT_RACED = "not raced"


def mode_of(facts: dict[str, Any]) -> str:
    """What a row's speed-up is compared with: the uncached pipeline of the same mode."""
    return _MODES[0] if facts["is_compiled"] else _MODES[1]


def speed_of(facts: dict[str, Any]) -> float:
    """Median of how many times faster the contender is than the uncached pipeline of its mode."""
    return facts[f"speedup_over_{mode_of(facts)}"]


def quality_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By mode and quality: the fastest contender of each kind that reaches it, and what interpolating between knobs gives."""
    measured = [facts for facts in rows if "psnr" in facts and facts["kind"] != "reference"]
    found = []
    for mode, quality in itertools.product(_MODES, QUALITIES):
        racing = [facts for facts in measured if mode_of(facts) == mode]
        best = {title: _fastest([f for f in racing if f["kind"] == kind], quality) for title, kind in _KINDS.items()}
        found.append(
            {
                "mode": mode,
                "PSNR at least": quality,
                **best,
                "ratio": _ratio(best["AFCache"], best["fastest peer"]),
                "interpolated": _interpolated(racing, quality),
            }
        )
    return found


def _fastest(rows: list[dict[str, Any]], quality: float) -> dict[str, Any] | str:
    """The fastest row that is good enough; a word where there is none."""
    best = max((facts for facts in rows if facts["psnr"] >= quality), key=speed_of, default=None)
    if best is None:
        return "none reaches it" if rows else _NOT_RACED
    return {
        "contender": best["contender"],
        "speed-up": speed_of(best),
        "PSNR": best["psnr"],
        "worst PSNR": best["psnr_worst"],
        **({"flicker": best["flicker"]} if "flicker" in best else {}),
    }


def _ratio(ours: dict[str, Any] | str, peer: dict[str, Any] | str) -> float | None:
    return None if isinstance(ours, str) or isinstance(peer, str) else ours["speed-up"] / peer["speed-up"]


def _interpolated(rows: list[dict[str, Any]], quality: float) -> dict[str, float]:
    """The families' speed over the uncached pipeline where their curve meets the quality; 1: it does not."""
    curves: dict[str, list[Point]] = {}
    for facts in rows:
        point = Point(speed_of(facts), (facts["psnr"],), flops=0.0, ssim=facts["ssim"], accuracy=0.0)
        curves.setdefault(facts["family"], []).append(point)
    return {family: round(speed_at(points, quality), 3) for family, points in curves.items()}


def shown_quality(row: dict[str, Any]) -> dict[str, str]:
    """A row as the pages show it."""
    return {
        "mode, mean PSNR": f"{row['mode']}, {row['PSNR at least']} dB or better",
        **{title: _named(row[title]) for title in list(_KINDS)[:2]},
        "ratio": "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
        "fewer steps": _named(row["fewer steps"]),
    }


def _named(best: dict[str, Any] | str) -> str:
    if isinstance(best, str):
        return best
    name = best["contender"].removesuffix(", compiled")
    return f"{best['speed-up']:.2f}x (`{name}`, {best['PSNR']:.1f} dB, worst {best['worst PSNR']:.1f} dB)"


def interpolation_notes(rows: list[dict[str, Any]]) -> list[str]:
    """What straight lines between a family's knobs would give, for those families that reach the quality."""
    lines = []
    for row in rows:
        reached = {family: speed for family, speed in row["interpolated"].items() if speed != 1}
        speeds = ", ".join(f"{family} {speed:.2f}x" for family, speed in reached.items()) or "nobody"
        lines.append(f"Interpolated between knobs, {row['mode']}, at {row['PSNR at least']} dB: {speeds}.")
    return lines


def verdict(rows: list[dict[str, Any]], *, is_random: bool, is_quick: bool = False) -> list[str]:
    """The same in words; of random weights, what is not compared."""
    if is_random:
        return ["Random weights: this compares what steps cost, and says nothing about quality."]
    lines = ["One knob of every peer: who is fastest at equal quality, a run without --quick tells."] if is_quick else []
    for row in quality_rows(rows):
        shown = shown_quality(row)
        line = f"{shown['mode, mean PSNR']}: AFCache {shown['AFCache']}; peers: {shown['fastest peer']}"
        if row["ratio"] is not None:
            line += f", AFCache {row['ratio']:.2f} times as fast"
        lines.append(f"{line}; fewer steps: {shown['fewer steps']}")
    return lines
