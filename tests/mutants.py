"""Mutants: small faults that the tests must notice. `python -m tests.mutants [NAME ...]` plants each, and runs its tests.

The faults are in tests/support/mutants.py. Each is planted in a copy of the repository, alone. The copy passes the same tests
before, so that a mutant is caught by what it changes and by nothing else.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent
SECONDS = 900
# What pytest returns where tests ran and some failed; 2 and above: it could not run them.
FAILED = 1


def with_fault(mutant: Mutant, text: str) -> str:
    """The text of a file with the fault in it.

    Raises:
        ValueError: what it replaces is not there exactly once.

    """
    found = text.count(mutant.old)
    if found != 1:
        raise ValueError(f"{mutant.name}: afcache/{mutant.file} must hold {mutant.old!r} once, found {found} times.")
    return text.replace(mutant.old, mutant.new)


def run_tests(root: Path, tests: list[str], only: str) -> tuple[int, str]:
    """Run tests of a copy until the first that fails; pytest's exit status, and its last lines."""
    selected = ["-k", only] if only else []
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *selected]
    command += [f"tests/{test}" for test in tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    return done.returncode, done.stdout[-1500:]


def check_untouched(root: Path, mutants: list[Mutant]) -> None:
    """All tests of the mutants pass on the copy as it is; those with the same expression run together.

    Raises:
        RuntimeError: some do not; with pytest's last lines.

    """
    for only in sorted({mutant.only for mutant in mutants}):
        tests = sorted({mutant.tests for mutant in mutants if mutant.only == only})
        status, said = run_tests(root, tests, only)
        if status:
            raise RuntimeError(f"{', '.join(tests)} must pass without a mutant.\n{said}")


def is_caught(root: Path, mutant: Mutant) -> bool:
    """Whether a test fails where the mutant is planted; the copy is left as it was.

    Raises:
        RuntimeError: the tests could not run at all.

    """
    path = root / "afcache" / mutant.file
    before = path.read_text()
    path.write_text(with_fault(mutant, before))
    status, said = run_tests(root, [mutant.tests], mutant.only)
    path.write_text(before)
    if status > FAILED:
        raise RuntimeError(f"{mutant.name}: its tests could not run.\n{said}")
    return status == FAILED


def main() -> int:
    """Plant the mutants that are named, or all; returns how many survived."""
    parser = argparse.ArgumentParser(description="Plant faults in a copy of the repository; its tests must notice each.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="any part of a mutant's name; all without")
    names = parser.parse_args().names
    mutants = [mutant for mutant in MUTANTS if not names or any(name in mutant.name for name in names)]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "repository"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".*", "__pycache__", "outputs"))
        for mutant in mutants:
            with_fault(mutant, (root / "afcache" / mutant.file).read_text())
        check_untouched(root, mutants)
        for mutant in mutants:
            began = time.perf_counter()
            found = is_caught(root, mutant)
            survivors += [] if found else [mutant.name]
            print(f"{'caught' if found else 'SURVIVED':<9}{time.perf_counter() - began:5.0f} s  {mutant.name}", flush=True)
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} mutants caught")
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main())
