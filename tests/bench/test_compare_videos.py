"""The rows of `bench.compare_videos`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import afcache
from afcache.settings.presets import for_videos, tuned
from bench import compare_videos
from bench.compare_videos import (
    BETWEEN,
    FEWER,
    OF_IMAGES,
    OF_IMAGES_TOLERANCES,
    TOLERANCES,
    Job,
    clips_of,
    everybody,
    forecasting,
    key_of,
    measure,
    racing,
    shown,
)
from bench.race.equal_videos import OURS, as_steady, at_equal_quality
from bench.race.subjects import Task

TASK = Task("mini-wan", 6, scheduler="FlowMatchEuler")


def row(family: str, kind: str, speed: float, psnr: float, flicker: float) -> dict[str, Any]:
    numbers = {"fewer block evaluations": speed, "PSNR (dB)": psnr, "worst clip": psnr - 5, "flicker": flicker}
    return {"contender": f"{family} {speed}", "family": family, "kind": kind, "failure": None, **numbers}


ROWS = [
    row("ours", "ours", 2.0, 45.0, 0.01),
    row("ours", "ours", 4.0, 35.0, 0.05),
    row("slow", "peer", 1.5, 42.0, 0.02),
    row("slow", "peer", 2.5, 32.0, 0.06),
    row("bad", "peer", 3.0, 20.0, 0.5),
    {"contender": "broken", "family": "broken", "kind": "peer", "failure": "ValueError: no"},
]


def test_families_are_compared_where_their_curves_meet_a_quality():
    ours, slow, last, _ = at_equal_quality(ROWS)
    assert (ours["family"], ours["mean PSNR"], slow["family"], last["mean PSNR"]) == ("ours", "40 dB", "slow", "35 dB")
    # Half of the way, and a fifth of it.
    assert ours["fewer block evaluations"] == pytest.approx(3.0)
    assert slow["fewer block evaluations"] == pytest.approx(1.7)
    assert ours["over the fastest peer"] == pytest.approx(3.0 / 1.7)
    assert ours["flicker"] == pytest.approx(0.03)
    assert slow["worst clip"] == pytest.approx(35.0)


def test_a_family_whose_fastest_knob_is_good_enough_is_told_of_at_that_knob():
    twice = row("ours", "ours", 4.0, 41.0, 0.03)
    (ours, *_), quality = at_equal_quality([*ROWS, twice]), 40
    # Of two with one speed, the better one.
    assert (ours["mean PSNR"], ours["fewer block evaluations"], ours["flicker"]) == (f"{quality} dB", 4.0, 0.03)


def test_ours_is_told_of_where_it_flickers_no_more_than_the_fastest_peer():
    knobs = [row(OURS, "ours", speed, psnr, flicker) for speed, psnr, flicker in ((2.0, 45.0, 0.02), (3.0, 41.0, 0.04))]
    peer = [row("peer", "peer", 1.5, 42.0, 0.02), row("peer", "peer", 2.5, 32.0, 0.06)]
    at_40, at_35 = as_steady([*knobs, *peer])
    # The peer has 0.028 at 40 dB and 1.7, where the faster knob flickers too much, and 0.048 at 35 dB.
    assert (at_40["contender"], at_40["flicker"], at_40["the fastest peer"]) == (f"{OURS} 2.0", 0.02, "peer")
    assert at_40["over the fastest peer"] == pytest.approx(2.0 / 1.7)
    assert (at_35["contender"], at_35["PSNR (dB)"]) == (f"{OURS} 3.0", 41.0)
    assert as_steady(knobs) == as_steady([*knobs, row("peer", "peer", 1.5, 42.0, 0.001)]) == []


def test_without_a_peer_that_is_good_enough_nothing_is_compared():
    assert [r["over the fastest peer"] for r in at_equal_quality(ROWS[:2])] == ["no peer reaches it"] * 2


def test_a_failure_is_a_row():
    assert shown(ROWS)[-1]["failure"] == "ValueError: no"
    assert shown(ROWS)[-1]["flicker"] == ""


def test_ours_race_with_the_presets_of_videos_and_beside_those_of_images():
    configs = {c.family: c.enable.keywords["config"] for c in racing(TASK) if "config" in getattr(c.enable, "keywords", {})}
    assert configs[OURS] == for_videos(tuned(TOLERANCES[-1]))
    assert configs[OF_IMAGES] == tuned(OF_IMAGES_TOLERANCES[-1])
    assert json.loads(key_of(everybody(TASK)["AFCache fast"], TASK, (0, 1)))["config"]["warmup_steps"] == 3


def test_peers_have_knobs_between_those_of_the_race():
    of_peers = {c.name: c for c in racing(TASK) if c.kind == "peer"}
    for family, knobs in BETWEEN.items():
        theirs = [c for c in of_peers.values() if c.family == family]
        assert {f"{family} {label}" for label, _ in knobs} <= {c.name for c in theirs}
        assert len({str(c.enable.keywords["knob"]) for c in theirs}) == len(theirs) > len(knobs)  # pyright: ignore[reportFunctionMemberAccess]


def test_contenders_have_names_of_their_own():
    for chosen in (racing(TASK), forecasting(TASK)):
        assert len({contender.name for contender in chosen}) == len(chosen)
        assert not any(contender.is_compiled for contender in chosen)
    assert {"eager", "AFCache balanced", "diffusers MagCache 0.12", "velocity, all else the same 0.016"} <= set(everybody(TASK))


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs, drawn = tmp_path / "runs.jsonl", []

    def draw(task: Task, chosen: list[str], seeds: range, *, processes: int) -> Iterator[dict[str, Any]]:
        drawn.append(chosen)
        yield from ({"contender": name, "number": len(drawn)} for name in chosen)

    monkeypatch.setattr(compare_videos, "_drawn", draw)

    def ask(names: list[str], seeds: range = range(2)) -> list[int]:
        return [each["number"] for each in compare_videos.run(TASK, names, seeds, processes=1, runs=runs)]

    assert ask(["AFCache balanced"]) == [1]
    assert ask(["diffusers MagCache 0.12", "AFCache balanced"]) == [2, 1]
    # Other seeds, and other settings under one name, are measured.
    assert ask(["AFCache balanced"], range(3)) == [3]
    monkeypatch.setitem(afcache.PRESETS, "balanced", tuned(0.5))
    assert ask(["AFCache balanced", "diffusers MagCache 0.12"]) == [4, 2]
    assert drawn == [["AFCache balanced"], ["diffusers MagCache 0.12"], ["AFCache balanced"], ["AFCache balanced"]]


@pytest.mark.host
def test_a_contender_is_measured_against_the_uncached_clips(monkeypatch: pytest.MonkeyPatch):
    references, evaluations = clips_of(Job("eager", TASK, (0,)))
    assert evaluations == TASK.steps
    same = measure(Job("eager", TASK, (0,), references))
    assert (same["PSNR (dB)"], same["fewer block evaluations"], same["flicker"]) == (150.0, 1.0, 0.0)
    cached = measure(Job("AFCache tolerance 0.064", TASK, (0,), references))
    assert 1.0 < cached["fewer block evaluations"] < TASK.steps
    assert 12.0 < cached["worst frame"] <= cached["PSNR (dB)"] < 100.0
    assert 0.0 < cached["flicker"] < 1.0
    fewer = next(contender for contender in racing(TASK) if contender.family == FEWER)
    assert measure(Job(fewer.name, TASK, (0,), references))["fewer block evaluations"] == pytest.approx(6 / 5)
    monkeypatch.setattr(compare_videos, "load", lambda task: None)
    assert measure(Job("AFCache balanced", TASK, (0,), references))["failure"].startswith(
        "NotImplementedError: pipe is a NoneType"
    )
