"""The folder of results: tables that their JSON renders to, nothing that no page refers to, files of a bearable length."""

import json
import re
import subprocess
from pathlib import Path

import pytest

import afcache
from bench.record.naming import BENCH, RESULTS, RUNS
from bench.record.render import render
from tests.bench.pages import ROOT, pages

STORED = sorted(RESULTS.glob("*.json"))
SOURCES = sorted(BENCH.rglob("*.py"))


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_every_table_is_what_its_json_renders_to(path: Path):
    assert path.with_suffix(".md").read_text() == render(json.loads(path.read_text()))


def test_every_table_has_a_json():
    assert {path.stem for path in RESULTS.glob("*.md")} == {path.stem for path in STORED}
    assert len(STORED) > 20


def test_every_result_is_referred_to_by_a_page():
    """A table counts for its JSON and its picture, and each of those for the others."""
    text = "\n".join(path.read_text() for path in pages())
    linked = {Path(name).stem for name in re.findall(r"bench/results/([\w.-]+\.(?:md|json|png))", text)}
    unread = sorted(path.name for path in RESULTS.iterdir() if path.stem not in linked)
    assert unread == [], "refer to these from README.md or docs, or take them out of bench/results"


def test_results_are_tables_and_pictures_and_caches_lie_where_git_ignores_them():
    assert {path.suffix for path in RESULTS.iterdir()} == {".json", ".md", ".png", ".gif"}
    ignored = subprocess.run(["git", "check-ignore", RUNS / "evaluations.jsonl"], cwd=ROOT, capture_output=True, check=False)
    assert ignored.returncode == 0


def test_no_benchmark_is_called_after_a_public_function():
    """Somebody who looks for `afcache.report` should find one file. One command is older than the rule, and keeps its path."""
    assert {path.stem for path in SOURCES} & set(afcache.__all__) == {"export_step"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(BENCH)))
def test_no_benchmark_is_longer_than_300_lines_or_types_a_month(path: Path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    assert re.findall(r"_20\d{4}\b", text) == [], "bench.record.naming writes and finds months"
