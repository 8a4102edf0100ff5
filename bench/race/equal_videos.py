"""Families of caches on videos, compared where they have one quality: how fast they are there, and how much flickers."""

import itertools
from collections.abc import Sequence
from typing import Any

QUALITIES = (40, 35)
OURS = "AFCache"
SPEED, PSNR = "fewer block evaluations", "PSNR (dB)"
# What is told of a family at a quality.
_AT = (SPEED, "flicker", "worst clip")


def at_equal_quality(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Families that reach a quality: their speed there, linearly between knobs, and flicker and worst clip at that speed."""
    found = []
    for quality in QUALITIES:
        places = {name: _at(curve, quality) for name, curve in _curves(rows).items()}
        reached = {name: place for name, place in places.items() if place is not None and place[SPEED] > 1}
        peers = {row["family"] for row in rows if row["kind"] == "peer"}
        best = max((place[SPEED] for name, place in reached.items() if name in peers), default=None)
        for name, place in sorted(reached.items(), key=lambda item: -item[1][SPEED]):
            over = {"over the fastest peer": place[SPEED] / best if best else "no peer reaches it"}
            found.append({"family": name, "mean PSNR": f"{quality} dB", **place, **over})
    return found


def as_steady(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our fastest knob of a quality that flickers no more than the fastest peer does where it has that quality."""
    fastest = {place["mean PSNR"]: place for place in at_equal_quality(rows) if place["over the fastest peer"] == 1}
    found = []
    for quality in QUALITIES:
        rival = fastest.get(f"{quality} dB")
        knobs = [row for row in rows if row["family"] == OURS and row["failure"] is None and row[PSNR] >= quality]
        steady = [row for row in knobs if rival is not None and row["flicker"] <= rival["flicker"]]
        if rival is not None and steady:
            ours = max(steady, key=lambda row: row[SPEED])
            facts = {key: ours[key] for key in (SPEED, PSNR, "flicker", "worst clip")}
            over = {"over the fastest peer": ours[SPEED] / rival[SPEED], "the fastest peer": rival["family"]}
            found.append({"contender": ours["contender"], "at least": f"{quality} dB", **facts, **over})
    return found


def _curves(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["failure"] is None:
            curves.setdefault(row["family"], []).append(row)
    return curves


def _at(curve: list[dict[str, Any]], quality: float) -> dict[str, float] | None:
    """Where a family is fastest with a quality, linearly between knobs that are neighbours in speed; None: nowhere."""
    ordered = sorted(curve, key=lambda row: (row[SPEED], row[PSNR]))
    places = [{key: row[key] for key in _AT} for row in ordered if row[PSNR] >= quality]
    for slow, fast in itertools.pairwise(ordered):
        if slow[PSNR] >= quality > fast[PSNR]:
            share = (slow[PSNR] - quality) / (slow[PSNR] - fast[PSNR])
            places.append({key: slow[key] + share * (fast[key] - slow[key]) for key in _AT})
    return max(places, key=lambda place: (place[SPEED], -place["flicker"]), default=None)
