"""compare_multi_gpu: what a division is, and one small run of real processes."""

import json
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from bench.compare_multi_gpu import DIVISIONS, parse_division
from bench.record.naming import result_path

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("text", "processes", "is_guided"),
    [("alone", 1, False), ("guided", 1, True), ("ulysses2-ring2", 4, False), ("guided-cfg2-ulysses4", 8, True)],
)
def test_a_division_is_its_degrees(text: str, processes: int, is_guided: bool):
    division = parse_division(text)
    assert (division.processes, division.is_guided) == (processes, is_guided)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor2", "'tensor2' in 'tensor2' is none of alone, guided"),
        ("cfg2", "has none; write guided-cfg2"),
        ("ring0", "none of"),
    ],
)
def test_a_division_that_cannot_be_says_so(text: str, message: str):
    with pytest.raises(ArgumentTypeError, match=message):
        parse_division(text)


def test_all_default_divisions_can_be():
    assert [parse_division(text).name for text in DIVISIONS] == DIVISIONS


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_two_processes_agree_with_one(tmp_path: Path):
    command = [sys.executable, str(ROOT / "bench/compare_multi_gpu.py"), "--size", "tiny", "--backend", "none", "--rounds", "1"]
    command += ["--device", "cpu", "--output", str(tmp_path), "--divisions", "alone", "ulysses2"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    alone, shared = json.loads(result_path("multi_gpu", ".json", folder=tmp_path).read_text())["rows"]
    assert (alone["collectives, refresh"], alone["largest difference"]) == (0, 0)
    # Three blocks exchange heads twice; the velocity; the errors that the first rank has measured.
    assert (shared["collectives, refresh"], shared["collectives, cached"]) == (3 * 2 + 1 + 1, 0)
    assert shared["same decisions"] == "yes"
    assert shared["largest difference"] < 1e-5
