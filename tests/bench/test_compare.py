"""compare_compiled as a command: what it is asked, and small runs of real processes."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.compare_compiled import _choose, main
from bench.race.contender import Contender
from bench.race.turns import check_references
from bench.record.naming import result_path
from tests.support.mini_flux import fresh_mini_flux
from tests.support.sampling import shorten

pytestmark = pytest.mark.host


def test_a_quick_run_leaves_no_family_out():
    kinds = ("every knob", "one knob", "one pattern")
    everybody, quick, forced = (_choose([], model="mini", of_each=kind) for kind in kinds)

    def families(chosen: list[Contender]) -> set[tuple[str, bool]]:
        return {(c.family, c.is_compiled) for c in chosen}

    assert families(everybody) == families(quick) == families(forced)
    assert len(everybody) > len(quick) > len(forced) == len(families(everybody))
    assert [c.name for c in _choose(["lite every 6"], model="mini", of_each="one knob")] == [
        "diffusers TaylorSeer lite every 6",
        "diffusers TaylorSeer lite every 6, compiled",
    ]
    with pytest.raises(SystemExit, match="--contenders must be parts of names; none has 'teacash'"):
        _choose(["teacash"], model="mini", of_each="one knob")


def test_caches_of_videos_race_where_there_is_one():
    images, videos = (_choose([], model=f"random:{name}", of_each="one pattern") for name in ("qwen_image_small", "wan_small"))
    assert {c.family for c in videos} - {c.family for c in images} == {
        "diffusers PyramidAttentionBroadcast",
        "diffusers FasterCache",
    }
    assert {c.family for c in _choose([], model="mini-wan", of_each="one knob")} >= {c.family for c in videos}
    with pytest.raises(SystemExit, match="none has 'FasterCache'"):
        _choose(["FasterCache"], model="random:small", of_each="one pattern")


def test_a_reference_that_fails_stops_the_run_in_one_line(tmp_path: Path):
    failed: Any = {"eager": SimpleNamespace(name="eager", failure="no answer in 3 s")}
    with pytest.raises(SystemExit, match=r"the uncached pipeline itself failed \(eager\): no answer in 3 s; see"):
        check_references(failed, tmp_path)


def complaint(arguments: list[str], monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", ["compare_compiled.py", *arguments])
    with pytest.raises(SystemExit):
        main()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--mini --resolution 64", "--resolution cannot be given with --mini"),
        ("--mini-wan --resolution 64", "--resolution cannot be given with --mini"),
        ("--mini --patterns {stored}", "--patterns needs --random"),
        ("--random tiny --patterns {stored}", "--patterns are of 4 steps, and --steps is 28"),
        ("--random tiny --steps 2 --patterns {stored}", "--patterns are of 4 steps, and --steps is 2"),
        ("--random tiny --steps 4 --patterns {stored}", "--patterns know nothing of 'AFCache quality'"),
        ("--random wan_huge", "argument --random: invalid choice: 'wan_huge' (choose from"),
        ("--random tiny --patterns nowhere.json", "nowhere.json is no result of this command (FileNotFoundError"),
    ],
)
def test_options_without_effect_are_refused(arguments: str, message: str, tmp_path: Path, monkeypatch, capsys):
    stored = tmp_path / "patterns.json"
    patterns = {"eager": "FFFF", "50% of the steps": "FF", "AFCache fast": "FF.F"}
    stored.write_text(json.dumps({"rows": [{"contender": name, "pattern": pattern} for name, pattern in patterns.items()]}))
    assert message in complaint(arguments.format(stored=stored).split(), monkeypatch, capsys)


SCRIPT = Path(__file__).parent.parent.parent / "bench" / "compare_compiled.py"


def fixed(folder: Path) -> list[str]:
    return ["--seeds", "2", "--backend", "eager", "--output", str(folder)]


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """By contender."""
    (stored,) = (path for path in folder.glob("*.json") if "fastest" not in path.name)
    return {row["contender"]: row for row in json.loads(stored.read_text())["rows"]}


def compare(folder: Path, monkeypatch, capsys, *arguments: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """Run the command in this process; what it printed, and its rows."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, *fixed(folder)])
    main()
    return capsys.readouterr().out, rows_of(folder)


def compare_as_a_file(folder: Path, *arguments: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The same as a file, from another folder."""
    command = [sys.executable, str(SCRIPT), *arguments, *fixed(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout, rows_of(folder)


def test_from_end_to_end(tmp_path: Path, monkeypatch, capsys):
    """Somebody's model, a folder as `save_pretrained` writes it; then random weights, with the decisions of the first run."""
    folder = str(tmp_path / "model")
    shorten(fresh_mini_flux()).save_pretrained(folder)
    names = ("AFCache fast, compiled", "compiled by regions", "ParaAttention 0.12, compiled")
    arguments = ("--resolution", "32", "--steps", "8")
    printed, rows = compare(tmp_path, monkeypatch, capsys, "--model", folder, *arguments, "--contenders", *names)
    assert "compiled, 40 dB or better: AFCache" in printed
    assert "failed: TypeError" in printed
    assert set(rows) == {"eager", "compiled", *names}
    assert rows["compiled"]["psnr"] > 80
    assert 15 < rows["AFCache fast, compiled"]["psnr"] < 100
    assert rows["AFCache fast, compiled"]["graphs"] == 1
    assert list(tmp_path.glob("*_quality.png"))
    (stored,) = (path for path in tmp_path.glob("*.json") if "fastest" not in path.name)
    again = tmp_path / "again"
    again.mkdir()
    arguments = ("--steps", "8", "--patterns", str(stored), "--contenders", "AFCache fast, compiled")
    printed, repeated = compare_as_a_file(again, "--random", "tiny", *arguments)
    assert "says nothing about quality" in printed
    repetition, original = repeated["AFCache fast, compiled"], rows["AFCache fast, compiled"]
    assert repetition["pattern"] == original["pattern"]
    assert repetition["psnr_with_these_decisions"] == original["psnr"]
    assert "psnr" not in repetition
    assert result_path("compare_random_tiny", ".png", part="time", folder=again).stat().st_size > 10_000
