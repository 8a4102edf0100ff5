"""What stands on the screen, and what has to be imported for it."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from afcache.cli.silence import quiet, quiet_imports

# Prints the status, and which libraries had been imported by the end.
RUN = """
import json, sys
from afcache.cli.main import main
try:
    status = main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
print(json.dumps([status, [name for name in ("torch", "diffusers", "xfuser") if name in sys.modules]]))
"""


def run(*arguments: str) -> tuple[int, list[str], list[str]]:
    """Status, libraries imported and lines on stderr of a command in a process of its own."""
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=True)
    status, libraries = json.loads(done.stdout.splitlines()[-1])
    return status, libraries, done.stderr.splitlines()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["generate", "--help"], 0),
        (["generate", "--steps", "0"], 2),
        (["generate", "--tolerance", "-1"], 2),
        (["generate", "--model", "/nonexistent", "--prompt", "x"], 2),
        (["generate", "--height", "33"], 2),
        (["calibrate", "--target-psnr", "999"], 2),
    ],
)
def test_help_and_errors_import_nothing_heavy(arguments: list[str], status: int):
    found, libraries, errors = run(*arguments)
    assert (found, libraries) == (status, [])
    assert len(errors) == (1 if status else 0)


def test_info_needs_no_diffusers():
    assert run("info") == (0, ["torch"], [])


def test_generate_prints_no_other_librarys_words(tmp_path: Path):
    arguments = ["--no-compile", "--steps", "4", "--prompt", "a two", "--output", str(tmp_path)]
    status, libraries, errors = run("generate", *arguments)
    assert (status, libraries, errors) == (0, ["torch", "diffusers"], [])
    assert (tmp_path / "a_two_seed0.png").is_file()


def test_warnings_that_are_logged_while_drawing_reach_the_user(caplog):
    with caplog.at_level(logging.DEBUG), quiet():
        logging.getLogger("afcache.test").warning("the correction is off")
        logging.getLogger("other").info("a group is made")
        with quiet_imports():
            logging.getLogger("other").warning("a kernel is missing")
    assert [record.message for record in caplog.records] == ["the correction is off"]
    assert logging.root.manager.disable == logging.NOTSET
