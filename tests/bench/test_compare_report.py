"""What compare_compiled says of what it measured: rows by hand, equal quality, tables of pages."""

import json
import re

import numpy as np
import pytest

from bench.race import compare_report, equal_quality
from bench.race.contender_process import Drawn, Finished, Ready
from bench.race.contenders import contenders
from bench.race.subjects import Task
from bench.race.turns import Race
from bench.record import readme_tables
from bench.record.naming import newest_result
from tests.bench.pages import pages

BY_NAME = {contender.name: contender for contender in contenders()}


def race(name: str, seconds: float, shares: list[float], error: float) -> Race:
    """Images of 4 steps whose transformer takes all but 0.1 s; the references' take 1.1 s eager, 0.6 s compiled."""
    reference = np.full((8, 8, 3), 0.5)

    def drawn(total: float, offset: float, steps: int = 4) -> Drawn:
        return Drawn(reference + offset, total, [(total - 0.1) / steps] * steps)

    rivals = {"eager": {s: drawn(1.1, 0.0) for s in (0, 1)}, "compiled": {s: drawn(0.6, 0.0) for s in (0, 1)}}
    mine = {s: drawn(seconds, error, len(shares)) for s in (0, 1)}
    ready = Ready(9.0, {0: shares, 1: shares}, graphs=1, graph_breaks=2)
    return Race(BY_NAME[name], None, ready, Finished(3, 500.0), mine, rivals)


def test_a_row_by_hand():
    facts = compare_report.row(race("AFCache balanced, compiled", 0.35, [1.0, 1.0, 0.0, 0.0], 0.01), Task("mini", 4))
    assert facts["speedup_over_eager"] == pytest.approx(1.1 / 0.35)
    assert facts["speedup_over_compiled"] == pytest.approx(0.6 / 0.35)
    assert facts["fewer_block_evaluations"] == pytest.approx(2.0)
    assert facts["efficiency"] == pytest.approx(0.6 / 0.35 / 2)
    assert facts["transformer_efficiency"] == pytest.approx(0.5 / 0.25 / 2)
    assert facts["psnr"] == pytest.approx(40.0)
    assert facts["pattern"] == "FF.."
    assert (facts["refreshes"], facts["cached_steps"]) == (2, 2)
    # 2 of 4 equal steps come first, and both others are cached.
    shares = [facts[f"{name}_seconds"] for name in ("first_two", "later_refreshes", "later_cached")]
    assert shares == pytest.approx([0.125, 0.0, 0.125])
    assert facts["rest_share"] == pytest.approx(0.1 / 0.35)
    eager = compare_report.row(race("AFCache balanced", 0.6, [1.0, 1.0, 0.0, 0.0], 0.01), Task("mini", 4))
    assert eager["efficiency"] == pytest.approx(1.1 / 0.6 / 2)
    shown = compare_report.shown(facts)
    assert (shown["over compiled"], shown["PSNR"], shown["graphs"]) == ("1.71x (1.71 to 1.71)", "40.0", "1 (2 breaks, 3 later)")


def test_clips_are_measured_in_time():
    run = race("AFCache balanced", 0.6, [1.0, 1.0, 0.0, 0.0], 0.0)
    clip = np.linspace(0, 0.5, 3)[:, None, None, None] * np.ones((3, 8, 8, 3))
    wrong = clip + np.array([0.0, 0.01, 0.0])[:, None, None, None]
    run = run._replace(
        drawn={seed: drawn._replace(pixels=wrong) for seed, drawn in run.drawn.items()},
        rivals={
            name: {seed: drawn._replace(pixels=clip) for seed, drawn in images.items()} for name, images in run.rivals.items()
        },
    )
    facts = compare_report.row(run, Task("mini-wan", 4))
    assert facts["psnr_worst_frame"] == pytest.approx(40)
    # Each of two changes is off by 0.01 where 0.25 moves.
    assert facts["flicker"] == pytest.approx(0.04)
    shown = compare_report.shown(facts)
    assert (shown["worst frame"], shown["flicker"]) == ("40.0", "0.0400")
    assert any("flicker is" in note for note in compare_report.notes(Task("mini-wan", 4), 2, is_quick=False))


def test_a_hit_recompile_limit_is_told():
    run = race("AFCache balanced, compiled", 0.35, [1.0, 1.0, 0.0, 0.0], 0.01)
    run = run._replace(finished=Finished(0, 500.0, hit_limit=True))
    shown = compare_report.shown(compare_report.row(run, Task("mini", 4)))
    assert shown["graphs"] == "1 (2 breaks, limit hit)"


def test_a_failure_is_a_row():
    failed = Race(BY_NAME["ParaAttention 0.12"], "TypeError: no", None, None, {}, {})
    facts = compare_report.row(failed, Task("mini", 4))
    assert facts["failure"] == "TypeError: no"
    assert compare_report.shown(facts)["seconds"] == "failed: TypeError: no"


def test_the_fastest_are_chosen_by_wall_clock_among_those_that_are_good_enough():
    races = [
        race("AFCache balanced, compiled", 0.3, [1.0, 0.0, 0.0, 0.0], 0.005),
        race("AFCache fast, compiled", 0.2, [1.0, 0.0, 0.0, 0.0], 0.015),
        race("cache-dit 0.24, compiled", 0.4, [1.0, 1.0, 0.0, 0.0], 0.008),
        race("diffusers MagCache 0.24, compiled", 0.15, [1.0, 0.0, 0.0, 0.0], 0.1),
        race("50% of the steps", 0.35, [1.0, 1.0], 0.02),
    ]
    rows = [compare_report.row(r, Task("mini", 4)) for r in races]
    at_40, at_35 = equal_quality.quality_rows(rows)[:2]
    assert (at_40["mode"], at_40["AFCache"]["contender"]) == ("compiled", "AFCache balanced, compiled")
    assert at_40["AFCache"]["speed-up"] == pytest.approx(2)
    assert at_40["fastest peer"]["contender"] == "cache-dit 0.24, compiled"
    assert at_40["fewer steps"] == "none reaches it"
    assert at_40["ratio"] == pytest.approx(0.4 / 0.3)
    assert equal_quality.shown_quality(at_35)["AFCache"] == "3.00x (`AFCache fast`, 36.5 dB, worst 36.5 dB)"
    # 46.02 dB at 2x and 36.48 dB at 3x.
    assert at_40["interpolated"]["AFCache"] == pytest.approx(2 + (46.02 - 40) / (46.02 - 36.48), abs=2e-3)
    assert "AFCache 2.63x" in equal_quality.interpolation_notes([at_40])[0]
    lines = equal_quality.verdict(rows, is_random=False)
    assert equal_quality.verdict(rows, is_random=False, is_quick=True)[1:] == lines
    assert lines[0].startswith("compiled, 40 dB or better: AFCache 2.00x")
    assert "AFCache 1.33 times as fast" in lines[0]


def test_eager_contenders_are_compared_with_each_other_and_the_eager_pipeline():
    races = [
        race("AFCache fast", 0.6, [1.0, 0.0, 0.0, 0.0], 0.005),
        race("AFCache fast, compiled", 0.2, [1.0, 0.0, 0.0, 0.0], 0.005),
        race("diffusers MagCache 0.24", 0.5, [1.0, 0.0, 0.0, 0.0], 0.005),
    ]
    at_40 = equal_quality.quality_rows([compare_report.row(r, Task("mini", 4)) for r in races])[2]
    assert (at_40["mode"], at_40["AFCache"]["contender"]) == ("eager", "AFCache fast")
    assert at_40["AFCache"]["speed-up"] == pytest.approx(1.1 / 0.6)
    assert at_40["ratio"] == pytest.approx(0.5 / 0.6)
    assert at_40["fewer steps"] == "not raced"


def test_tables_of_pages_are_made_of_stored_rows(capsys):
    readme_tables.main()
    rows = json.loads(newest_result("compare_mini").read_text())["rows"]
    fast = next(row for row in rows if row["contender"] == "AFCache fast, compiled")
    quality, medium, small, qwen_image, wan, steps, messages = capsys.readouterr().out.strip().split("\n\n")
    assert f"{fast['speedup_over_compiled']:.2f}x (`AFCache fast`" in quality
    assert "| `AFCache fast` | compiled |" in medium
    assert {"`AFCache` | compiled", "`AFCache` | eager"} <= set(re.findall(r"`AFCache` \| \w+", small))
    text = "\n".join(path.read_text() for path in pages())
    assert qwen_image in text
    assert wan in text
    assert steps in text
    assert messages in text
