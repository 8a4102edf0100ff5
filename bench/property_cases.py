"""The property tests on more cases than CI tries.

    python -m bench.property_cases --cases 1000

The same tests as `pytest tests/properties`, which tries 50 cases of each; written are the cases that really ran, of each
property, how long they took, and how many tests failed. The status is 1 if any did.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.record.recording import write_result
from bench.record.render import table

_TESTS = Path(__file__).parent.parent / "tests" / "properties"


class Recorder:
    """A plugin of pytest that keeps one row for each property."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        self._counted = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a test, or one parameter of it, to its row; a fixture that fails counts as a failure."""
        if report.when != "call" and report.passed:
            return
        file, _, name = report.nodeid.partition("::")
        stem, what = Path(file).stem.removeprefix("test_"), name.partition("[")[0].removeprefix("test_")
        empty = {
            "subject": stem.replace("_", " "),
            "property": what.replace("_", " "),
            "cases": 0,
            "seconds": 0.0,
            "failures": 0,
        }
        row = self.rows.setdefault((stem, what), empty)
        counted = _count_cases()
        row["cases"] += counted - self._counted
        row["seconds"] = round(row["seconds"] + report.duration, 1)
        row["failures"] += int(report.failed)
        self._counted = counted


def _count_cases() -> int:
    """All cases so far, of tests that pytest imported."""
    return sys.modules["tests.support.cases"].RAN.total()


def main() -> int:
    """Run and write bench/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="of each property and parameter (default 1000)")
    parser.add_argument("--only", default="", metavar="WORDS", help="pytest's -k")
    arguments = parser.parse_args()
    os.environ["AFCACHE_CASES"] = str(arguments.cases)
    recorder = Recorder()
    options = ["--quiet", "-p", "no:cacheprovider", "-o", "timeout=0", "-k", arguments.only]
    status = pytest.main([str(_TESTS), *options], plugins=[recorder])
    rows = list(recorder.rows.values())
    if not rows:
        return int(status)
    totals = {key: sum(row[key] for row in rows) for key in ("cases", "seconds", "failures")}
    rows.append({"subject": "all", "property": "", **totals, "seconds": round(totals["seconds"], 1)})
    notes = [
        f"{arguments.cases} cases of every property, of each of its parameters where it has some (a field of the settings, an "
        "option of the command line); fewer where there are no more. A property tried on one case is a list of values.",
        "The cases are the same in every run of one version of hypothesis; one process.",
    ]
    print(table(rows))
    if not arguments.only:
        print(write_result("property_cases", "Property tests on random cases", rows, notes=notes))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
