"""The pages' numbers, and the check of them."""

import json
from pathlib import Path

import pytest

from bench import readme_numbers
from bench.readme_numbers import PAGES, README, ROOT, find_unbacked
from bench.record.recording import RESULTS

RESULT = {
    "commit": "abc",
    "torch": "9.87",
    "minutes": 33.1,
    "notes": ["wall clock  7.77x faster", "6.66 in words"],
    "rows": [
        {"speed": 2.668, "PSNR": 57.13, "share": 0.0834, "spread": "0.17 (0.15 to 0.21)", "n": 64, "name": "threshold 0.31"},
        *({"speed": speed} for speed in (1.11, 2.22, 3.33)),
    ],
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "gain_cpu.json").write_text(json.dumps(RESULT))
    return tmp_path


LINK = "([table](bench/results/gain_cpu.md))"


@pytest.mark.parametrize(
    ("text", "unbacked"),
    [
        (f"2.67x at 57.1 dB {LINK}", []),
        (f"2.67 times, 8.3 %, 83.4 ms, 0.21 s {LINK}", []),
        (f"2.68x {LINK}", ["2.68"]),
        (f"57.2 dB and 2.67x {LINK}", ["57.2"]),
        (f"a ratio of 1.42 {LINK}", ["1.42"]),
        (f"64 seeds, 28 steps {LINK}", []),
        (f"28 s with Python 3.11 and torch 2.13 {LINK}", ["28"]),
        (f"`tolerance=0.5` and hidden 512 {LINK}", []),
        ("2.67x ([table](../bench/results/gain_cpu.md))", []),
        ("3.14x without a link", ["3.14"]),
        ("torch 2.13 and 1.5 times", []),
        (f"# One\n2.67x {LINK}\n# Two\n2.67x", ["2.67"]),
        (f"{LINK}\n```\nwall clock  9.99x faster\n```", ["9.99"]),
        (f"| one | 2.67x | 57.1 dB | {LINK}", []),
        (f"| two rows | 2.67x | 57.1 dB | 1.11x | {LINK}", ["1.11"]),
        (f"two rows in words: 2.67x, 57.1 dB, 1.11x {LINK}", []),
        (f"| what it ran on | 9.87x | {LINK}", ["9.87"]),
        (f"| a name | 0.31 | {LINK}", ["0.31"]),
        (f"a note: 6.66x {LINK}", ["6.66"]),
        (f"it took 33 min {LINK}", []),
        (f"it took 34 min {LINK}", ["34"]),
        (f"{LINK}\n```\nwall clock  7.77x faster\n```", []),
        (f"{LINK}\n```\nwall clock  2.67x faster\n```", ["2.67"]),
        (f"{LINK}\n| first | 2.67x |\n\nA table without results:\n| second | 2.67x |", ["2.67"]),
        (f"{LINK}\n```python\nspeed = 9.99  # 9.99x\n```", []),
    ],
)
def test_measured_numbers_must_stand_in_a_linked_result(text: str, unbacked: list[str], results: Path):
    assert [claim.text for claim in find_unbacked(text, results)] == unbacked


def test_a_missing_result_backs_nothing(tmp_path: Path):
    (claim,) = find_unbacked(f"first line\n2.67x {LINK}", tmp_path)
    assert (claim.text, claim.unit, claim.line) == ("2.67", "x", 2)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_pages_numbers_are_backed(page: Path):
    assert list(find_unbacked(page.read_text(), RESULTS)) == []


def test_readme_and_all_of_docs_are_checked():
    assert README in PAGES
    assert {ROOT / "docs" / name for name in ("results.md", "how-it-works.md", "usage.md")} < set(PAGES)


def test_the_check_names_the_page_and_the_line(monkeypatch, capsys):
    readme_numbers.check()
    assert capsys.readouterr().out == f"every measured number of {len(PAGES)} pages stands in bench/results\n"
    page = ROOT / "docs" / "results.md"
    monkeypatch.setattr(Path, "read_text", lambda path: "first\n9.99x" if path == page else "")
    with pytest.raises(SystemExit):
        readme_numbers.check()
    assert capsys.readouterr().out == "docs/results.md:2: 9.99x stands in no result that its section links to\n"
