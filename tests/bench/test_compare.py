"""compare_compiled: what it counts, what it says, and that every contender is what its name says."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import afcache
from bench.compare_compiled import Race, _check, _choose, main
from bench.mini_flux.sampling import SETTINGS, draw, prompt_of
from bench.models.random_flux import draw_random, make_pipeline, make_transformer
from bench.race import compare_report, equal_quality
from bench.race.contender_process import GAVE_UP, Drawn, Finished, Racer, Ready, StepClock, _peak_mib, count_evaluations
from bench.race.contenders import Contender, calibrate_magcache, contenders
from bench.race.subjects import Task, load
from bench.readme_numbers import ROOT
from bench.record import readme_tables
from bench.record.recording import RESULTS

pytestmark = pytest.mark.host
PATTERN = "FF.F..F...F."
TASK = Task("random:tiny", steps=len(PATTERN), patterns={"": PATTERN}, backend="aot_eager")
# Installing cache-dit's cache changes a class of diffusers, so its contenders run in processes of their own.
BY_NAME = {contender.name: contender for contender in contenders()}
IN_PROCESS = [c for c in contenders() if c.force is not None and c.module == "diffusers" and not c.is_compiled]


def test_contenders_have_names_of_their_own_and_say_whether_they_are_compiled():
    assert len(BY_NAME) == len(contenders())
    assert all(
        contender.name.endswith("compiled") for contender in contenders() if contender.is_compiled and contender.kind == "peer"
    )
    assert {c.family for c in contenders() if c.kind == "peer"} == {
        "cache-dit",
        "cache-dit + TaylorSeer",
        "diffusers FirstBlockCache",
        "diffusers TaylorSeer lite",
        "diffusers TaylorSeer",
        "diffusers MagCache",
        "ParaAttention",
    }


def test_a_quick_run_leaves_no_family_out():
    everybody, quick, forced = (_choose([], of_each=kind) for kind in ("every knob", "one knob", "one pattern"))

    def families(chosen: list[Contender]) -> set[tuple[str, bool]]:
        return {(c.family, c.is_compiled) for c in chosen}

    assert families(everybody) == families(quick) == families(forced)
    assert len(everybody) > len(quick) > len(forced) == len(families(everybody))
    assert [c.name for c in _choose(["lite every 6"], of_each="one knob")] == [
        "diffusers TaylorSeer lite every 6",
        "diffusers TaylorSeer lite every 6, compiled",
    ]
    with pytest.raises(SystemExit, match="--contenders must be parts of names; none has 'teacash'"):
        _choose(["teacash"], of_each="one knob")


def count(pipe: Any, steps: int = len(PATTERN)) -> list[float]:
    clock = StepClock(pipe.scheduler, lambda: None)
    return count_evaluations(pipe.transformer, clock, steps, lambda: draw_random(pipe, 16, steps=steps))


@pytest.mark.parametrize("contender", IN_PROCESS, ids=lambda c: c.name)
def test_forced_contenders_refresh_where_they_are_told(contender: Contender):
    pipe = make_pipeline(make_transformer(dim=64, double=1, single=2))
    assert contender.force is not None
    contender.force(pipe, PATTERN)
    for _ in range(2):
        assert "".join("F" if share > 0.99 else "." for share in count(pipe)) == PATTERN


@pytest.mark.parametrize("name", ["cache-dit 0.24", "cache-dit + TaylorSeer 0.24, compiled", "AFCache balanced, compiled"])
def test_a_contender_in_its_own_process(name: str, tmp_path: Path):
    racer = Racer(name, TASK, [0, 1], tmp_path / "log", limit=300)
    ready = racer.start()
    assert ready is not None, racer.failure
    assert "".join("F" if share > 0.99 else "." for share in ready.evaluations[0]) == PATTERN
    assert ready.graphs > 0 if "compiled" in name else ready.graphs == 0
    assert ready.graph_breaks == 0 or "cache-dit" in name
    images = [image for seed in (1, 1, 0) if (image := racer.draw(seed)) is not None]
    assert [len(image.step_seconds) for image in images] == [len(PATTERN)] * 3
    assert np.array_equal(images[0].pixels, images[1].pixels)
    assert not np.array_equal(images[0].pixels, images[2].pixels)
    assert images[0].seconds > sum(images[0].step_seconds) > 0
    finished = racer.finish()
    assert finished is not None
    assert finished.peak_mib > 100


def test_what_fails_says_so_and_answers_nothing_more(tmp_path: Path):
    racer = Racer("ParaAttention 0.12", TASK, [0], tmp_path / "log", limit=300)
    assert racer.start() is None
    assert "FluxSingleTransformerBlock.forward() missing" in (racer.failure or "")
    assert racer.draw(0) is None
    assert racer.finish() is None
    slow = Racer("eager", TASK, [0], tmp_path / "slow", limit=0.01)
    assert slow.start() is None
    assert slow.failure == "no answer in 0.01 s"


def test_counted_evaluations_are_the_reports(pipe):
    """Our own count and the hooks' are two ways to the same number."""
    afcache.compile_pipeline(pipe, compile=False)
    scheduler = pipe.scheduler
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    shares = count_evaluations(pipe.transformer, StepClock(pipe.scheduler, lambda: None), 28, lambda: draw(pipe, 3))
    report = afcache.report(pipe)
    assert shares == [1.0 if kind == "F" else 0.0 for kind in report.pattern()]
    assert sum(shares) * 12 == report.block_evaluations


def test_magcaches_own_calibration_is_read_and_agrees_with_ours(pipe):
    options = {"num_inference_steps": 5, **SETTINGS}

    def sample() -> Any:
        return pipe(prompt_of(3), generator=torch.Generator().manual_seed(3), **options)

    ratios = calibrate_magcache(pipe, 5, sample)
    ours = afcache.calibrate_magnitudes(pipe, [prompt_of(3)], generator=torch.Generator().manual_seed(3), **options)
    # Theirs is of the last block's output, after the text was taken off; ours of the whole stack, image tokens.
    assert ratios == pytest.approx(ours, abs=1e-3)


def test_the_clock_times_what_lies_between_the_schedulers_steps(monkeypatch):
    now = iter([0.0, 1.0, 1.5, 3.5, 4.0])
    monkeypatch.setattr("bench.race.contender_process.time.perf_counter", lambda: next(now))
    scheduler = SimpleNamespace(set_begin_index=lambda index: None, step=lambda: "stepped")
    clock = StepClock(scheduler, lambda: None)
    scheduler.set_begin_index(0)
    assert [scheduler.step(), scheduler.step()] == ["stepped", "stepped"]
    assert clock.seconds == [1.0, 2.0]


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


def test_few_values_have_extremes_and_many_have_quartiles():
    assert compare_report._quartiles([3.0, 1.0]) == [1.0, 3.0]
    assert compare_report._quartiles([0.0, 1.0, 2.0, 3.0, 4.0]) == [1.0, 3.0]


def test_a_hit_recompile_limit_is_told():
    run = race("AFCache balanced, compiled", 0.35, [1.0, 1.0, 0.0, 0.0], 0.01)
    run = run._replace(finished=Finished(0, 500.0, hit_limit=True))
    shown = compare_report.shown(compare_report.row(run, Task("mini", 4)))
    assert shown["graphs"] == "1 (2 breaks, limit hit)"


def test_a_reference_that_fails_stops_the_run_in_one_line(tmp_path: Path):
    failed: Any = {"eager": SimpleNamespace(name="eager", failure="no answer in 3 s")}
    with pytest.raises(SystemExit, match=r"the uncached pipeline itself failed \(eager\): no answer in 3 s; see"):
        _check(failed, tmp_path)


def complaint(arguments: list[str], monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", ["compare_compiled.py", *arguments])
    with pytest.raises(SystemExit):
        main()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--mini --resolution 64", "--resolution cannot be given with --mini"),
        ("--mini --patterns {stored}", "--patterns needs --random"),
        ("--random tiny --patterns {stored}", "--patterns are of 4 steps, and --steps is 28"),
        ("--random tiny --steps 2 --patterns {stored}", "--patterns are of 4 steps, and --steps is 2"),
        ("--random tiny --steps 4 --patterns {stored}", "--patterns know nothing of 'AFCache quality'"),
        ("--random tiny --patterns nowhere.json", "nowhere.json is no result of this command (FileNotFoundError"),
    ],
)
def test_options_without_effect_are_refused(arguments: str, message: str, tmp_path: Path, monkeypatch, capsys):
    stored = tmp_path / "patterns.json"
    patterns = {"eager": "FFFF", "50% of the steps": "FF", "AFCache fast": "FF.F"}
    stored.write_text(json.dumps({"rows": [{"contender": name, "pattern": pattern} for name, pattern in patterns.items()]}))
    assert message in complaint(arguments.format(stored=stored).split(), monkeypatch, capsys)


def test_a_process_tells_its_own_peak_of_memory(tmp_path: Path):
    status = tmp_path / "status"
    status.write_text("Name: python\nVmHWM:\t  2048 kB\n")
    assert _peak_mib(status) == 2.0
    assert _peak_mib() > 100
    # Some systems say nothing, or have no such file.
    status.write_text("Name: python\n")
    assert _peak_mib(status) > 100
    assert _peak_mib(tmp_path / "nowhere") > 100


def test_a_limit_of_dynamo_that_is_hit_is_found_in_what_it_prints(monkeypatch):
    """A contender's log is searched for this word."""
    messages: list[str] = []
    monkeypatch.setattr("torch._dynamo.convert_frame.log.warning", lambda message, *values: messages.append(message % values))
    with torch._dynamo.config.patch(recompile_limit=1, automatic_dynamic_shapes=False):
        compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
        for size in (2, 3):
            compiled(torch.ones(size))
    assert [GAVE_UP in message for message in messages] == [True]


def test_random_weights_are_made_in_their_own_precision():
    pipe = load(Task("random:tiny", 4, dtype="bfloat16"))
    assert pipe.transformer.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


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


def test_the_pages_tables_are_made_of_stored_rows(capsys):
    readme_tables.main()
    rows = json.loads((RESULTS / "compare_mini_cpu_202611.json").read_text())["rows"]
    fast = next(row for row in rows if row["contender"] == "AFCache fast, compiled")
    quality, medium, small, steps, messages = capsys.readouterr().out.strip().split("\n\n")
    assert f"{fast['speedup_over_compiled']:.2f}x (`AFCache fast`" in quality
    assert "| `AFCache fast` | compiled |" in medium
    assert {"`AFCache` | compiled", "`AFCache` | eager"} <= set(re.findall(r"`AFCache` \| \w+", small))
    page = (ROOT / "docs" / "results.md").read_text()
    assert steps in page
    assert messages in page


def compare(folder: Path, *arguments: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """Run the command as a file, from another folder; what it printed, and its rows by contender."""
    script = Path(__file__).parent.parent.parent / "bench" / "compare_compiled.py"
    fixed = ["--seeds", "2", "--backend", "aot_eager", "--output", str(folder)]
    result = subprocess.run(
        [sys.executable, str(script), *arguments, *fixed], capture_output=True, text=True, cwd=folder, check=False
    )
    assert result.returncode == 0, result.stderr
    (stored,) = (path for path in folder.glob("*.json") if "fastest" not in path.name)
    return result.stdout, {row["contender"]: row for row in json.loads(stored.read_text())["rows"]}


def test_random_weights_from_end_to_end(tmp_path: Path):
    names = ("AFCache balanced", "regions", "ParaAttention 0.12, compiled")
    printed, rows = compare(tmp_path, "--random", "tiny", "--steps", "6", "--contenders", *names)
    assert "says nothing about quality" in printed
    assert "failed: TypeError" in printed
    assert set(rows) == {
        "eager",
        "compiled",
        "compiled by regions",
        "AFCache balanced",
        "AFCache balanced, compiled",
        "ParaAttention 0.12, compiled",
    }
    assert rows["AFCache balanced, compiled"]["pattern"] == "FF...F"
    assert rows["AFCache balanced, compiled"]["graphs"] == 1
    assert "psnr" not in rows["AFCache balanced"]
    assert (tmp_path / "compare_random_tiny_cpu_202611_time.png").stat().st_size > 10_000


def test_somebodys_model_from_end_to_end(tmp_path: Path):
    """A folder as `save_pretrained` writes it; afterwards every contender repeats its decisions on random weights."""
    folder = str(afcache.mini_flux_folder())
    names = ("AFCache fast", "diffusers MagCache 0.12")
    arguments = ("--resolution", "32", "--steps", "8")
    printed, rows = compare(tmp_path, "--model", folder, *arguments, "--contenders", *names)
    assert "compiled, 40 dB or better: AFCache" in printed
    assert rows["compiled"]["psnr"] > 80
    assert 15 < rows["AFCache fast, compiled"]["psnr"] < 100
    assert list(tmp_path.glob("*_quality.png"))
    (stored,) = (path for path in tmp_path.glob("*.json") if "fastest" not in path.name)
    again = tmp_path / "again"
    again.mkdir()
    _, repeated = compare(again, "--random", "tiny", "--steps", "8", "--patterns", str(stored), "--contenders", *names)
    for name in ("AFCache fast", "AFCache fast, compiled", "diffusers MagCache 0.12"):
        assert repeated[name]["pattern"] == rows[name]["pattern"]
        assert repeated[name]["psnr_with_these_decisions"] == rows[name]["psnr"]
