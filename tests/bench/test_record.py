"""What benchmarks share: quartiles, the clock, names of files, and results that render to their tables."""

import json
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from bench.record import recording
from bench.record.clock import CallClock, processor_seconds_of, seconds_of
from bench.record.figure import new_figure
from bench.record.naming import device_kind, newest_result, result_path, short_name
from bench.record.recording import environment, write_result
from bench.record.render import render, render_all, table
from bench.record.spread import Spread, quantile, shown_spread, spread_of

MONTH = f"{datetime.now(UTC):%Y%m}"
ROWS = [{"name": "one", "value": 0.12345}, {"name": "two", "value": 2.0}]


def test_quantiles_lie_linearly_between_the_values():
    assert [quantile([4.0, 0.0, 2.0], share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("count", [5, 6, 7, 40])
def test_quartiles_are_the_inclusive_ones_of_statistics(count: int):
    values = [float((7 * i) % 41) for i in range(count)]
    assert spread_of(values) == pytest.approx(statistics.quantiles(values, n=4, method="inclusive"))


def test_few_values_have_extremes_and_many_have_quartiles():
    assert spread_of([3.0, 1.0]) == Spread(1.0, 2.0, 3.0)
    assert spread_of([3.0, 1.0, 8.0, 2.0]) == Spread(1.0, 2.5, 8.0)
    assert spread_of([0.0, 1.0, 2.0, 3.0, 4.0]) == Spread(1.0, 2.0, 3.0)
    assert spread_of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_no_values_have_no_spread():
    with pytest.raises(ValueError, match="values must hold at least one, got none"):
        spread_of([])
    assert shown_spread([]) == "-"


def test_a_spread_is_shown_in_the_tables_unit_with_all_digits_before_the_point():
    assert shown_spread([0.00166, 0.00161, 0.00171], scale=1e3) == "1.66 (1.61 to 1.71)"
    assert shown_spread([12.0, 1234.56, 98765.0]) == "1235 (12 to 98765)"


def test_seconds_are_those_of_the_action_alone():
    result, seconds = seconds_of(lambda: time.sleep(0.02) or "done")
    assert result == "done"
    assert 0.02 <= seconds < 2


@pytest.mark.parametrize("is_brief", [True, False])
def test_the_processors_clock_stands_still_while_nothing_is_computed(is_brief: bool):
    _, asleep = processor_seconds_of(lambda: time.sleep(0.2), is_brief=is_brief)
    total, awake = processor_seconds_of(lambda: sum(range(20_000_000)), is_brief=is_brief)
    assert total == 199_999_990_000_000
    assert asleep < 0.1 < awake


def test_a_call_clock_times_every_call_once_whatever_forward_is_bound():
    module = torch.nn.Linear(2, 2)
    clock = CallClock(module, label="call")
    module(torch.ones(1, 2))
    module.forward = lambda input: (time.sleep(0.02), input)[1]
    module(torch.ones(1, 2))
    quick, slow = clock.take()
    assert 0 < quick < slow
    assert slow >= 0.02
    assert clock.take() == []


def test_calls_are_found_in_a_profile_by_their_label():
    module = torch.nn.Linear(2, 2)
    CallClock(module, label="a call")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(torch.ones(1, 2))
        module(torch.ones(1, 2))
    events = profile.events()
    assert events is not None
    assert [event.name for event in events].count("a call") == 2


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce GTX 1080 Ti", "gtx1080"),
        ("AMD Instinct MI300X", "mi300x"),
        ("Graphics", "gpu"),
    ],
)
def test_a_gpus_short_name_is_its_model(name: str, short: str):
    assert short_name(name) == short


def test_files_are_called_by_subject_device_and_month(monkeypatch, tmp_path: Path):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H200")
    assert (device_kind("cpu"), device_kind("cuda:1")) == ("cpu", "h200")
    assert result_path("soak", ".json", folder=tmp_path) == tmp_path / f"soak_cpu_{MONTH}.json"
    assert result_path("soak", ".png", device="cuda", part="time", folder=tmp_path).name == f"soak_h200_{MONTH}_time.png"
    assert result_path("shapes", ".md", device=None).name == "shapes.md"


def test_the_newest_result_is_the_one_of_the_last_month(tmp_path: Path):
    for name in (
        "soak_cpu_202512",
        "soak_cpu_202602",
        "soak_cpu_202601",
        "soak_h200_202603",
        "soak_eager_cpu_202604",
        "soak_cpu_202605_fastest",
        "soak",
    ):
        (tmp_path / f"{name}.json").touch()
    assert newest_result("soak", folder=tmp_path).stem == "soak_cpu_202602"
    assert newest_result("soak", kind="h200", folder=tmp_path).stem == "soak_h200_202603"
    assert newest_result("soak", part="fastest", folder=tmp_path).stem == "soak_cpu_202605_fastest"
    assert newest_result("soak", kind=None, folder=tmp_path).stem == "soak"
    with pytest.raises(FileNotFoundError, match=r"holds no result of 'soak', part 'slowest', on cpu: run its benchmark first"):
        newest_result("soak", part="slowest", folder=tmp_path)


def test_a_result_renders_to_its_title_facts_notes_and_rows():
    result = {"title": "Speed", "commit": "abc", "minutes": 1.5, "notes": ["First.", "Second."], "rows": ROWS}
    head = "# Speed\n\n- commit: abc\n- minutes: 1.5\n\nFirst.\nSecond.\n\n"
    assert render(result) == head + "| name | value |\n|---|---|\n| one | 0.123 |\n| two | 2.00 |\n"
    assert render({**result, "shown": [{"other": True}]}) == head + "| other |\n|---|\n| True |\n"


def test_tables_show_floats_with_three_digits_and_everything_else_as_it_is():
    row = {"small": 0.000012345, "one": 1.0, "large": 123456.789, "count": 7, "text": "0.5", "nothing": None}
    assert table([row]).splitlines()[-1] == "| 1.23e-05 | 1.00 | 123456.79 | 7 | 0.5 | None |"


def test_a_written_result_holds_everything_that_its_table_says(tmp_path: Path):
    shown = [{"pair": (1, 2), "share": 0.5}]
    path = write_result("speed", "Speed", ROWS, notes=["A note."], shown=shown, folder=tmp_path / "new")
    stored = json.loads(path.with_suffix(".json").read_text())
    assert path.name == f"speed_cpu_{MONTH}.md"
    assert list(stored) == ["title", *environment(), "notes", "rows", "shown"]
    assert (stored["title"], stored["notes"], stored["rows"]) == ("Speed", ["A note."], ROWS)
    assert stored["device"].startswith("CPU")
    assert path.read_text() == render(stored)
    assert "| [1, 2] | 0.5 |" in path.read_text()


def test_a_result_names_the_device_that_it_was_measured_on(monkeypatch, tmp_path: Path):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    path = write_result("speed", "Speed", ROWS, notes=[], device="cuda", folder=tmp_path)
    assert path.name == f"speed_h100_{MONTH}.md"
    assert "- device: NVIDIA H100 80GB HBM3\n" in path.read_text()
    assert write_result("shapes", "Shapes", ROWS, notes=[], device=None, folder=tmp_path).name == "shapes.md"


def test_the_command_of_a_result_can_be_typed_again(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench/overhead.py", "steps", "--name", "two words"])
    monkeypatch.setattr(recording, "_started", lambda: "-m bench.overhead")
    assert environment()["command"] == "python -m bench.overhead steps --name 'two words'"


def test_rendering_again_writes_only_what_differs(tmp_path: Path):
    first, second = (write_result(name, name, ROWS, notes=[], folder=tmp_path) for name in ("first", "second"))
    second.write_text("edited by hand")
    assert list(render_all(tmp_path)) == [second]
    assert second.read_text() == render(json.loads(second.with_suffix(".json").read_text()))
    first.unlink()
    assert list(render_all(tmp_path)) == [first]
    assert list(render_all(tmp_path)) == []


def test_a_figure_is_drawn_without_a_display(tmp_path: Path):
    figure = new_figure(2, 1)
    figure.subplots().plot([0, 1])
    figure.savefig(tmp_path / "picture.png", dpi=100)
    assert (tmp_path / "picture.png").stat().st_size > 1000
