"""Ctrl-C: one line and status 130, while the command is starting as well as while it draws."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# A sitecustomize.py: Ctrl-C at the moment a module is first looked for; within a string's exec, as dataclasses have it, and
# with somebody who swallows it, as the start of torch and numpy does.
INTERRUPT = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            try:
                exec("os.kill(os.getpid(), signal.SIGINT)")
            except KeyboardInterrupt:
                if {is_swallowed}:
                    raise ImportError("cannot load module more than once per process")
                raise

sys.meta_path.insert(0, Interrupt())
"""


@pytest.fixture(autouse=True)
def heeds_interrupts() -> Iterator[None]:
    """What runs in the background ignores them, and so would its processes."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


COMMANDS = {"module": ["-m", "afcache"], "script": ["-c", "import sys; from afcache.cli.main import main; sys.exit(main())"]}
GENERATE = ["generate", "--no-compile", "--steps", "8"]


@pytest.mark.parametrize(
    ("how", "module", "is_swallowed"),
    [
        ("module", "argparse", False),
        ("script", "argparse", False),
        ("module", "torch", True),
        ("script", "diffusers", True),
        # While it draws: the report's plot.
        ("module", "matplotlib", False),
    ],
)
def test_an_interrupt_at_any_import_is_one_line(how: str, module: str, is_swallowed: bool, tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT.format(module=module, is_swallowed=is_swallowed))
    command = [sys.executable, *COMMANDS[how], *GENERATE, "--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "afcache: interrupted\n")


def test_an_interrupt_that_is_ignored_stays_ignored(tmp_path: Path):
    """As a shell starts processes in the background."""
    (tmp_path / "sitecustomize.py").write_text("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)")
    command = [sys.executable, *COMMANDS["module"], "info"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        time.sleep(0.5)
        assert interrupt(process) == (0, "")


@pytest.mark.parametrize("seconds", [0.7, 2.0])
def test_an_interrupt_soon_after_the_start_is_one_line(seconds: float, tmp_path: Path):
    process = start("--num-images", "1000", "--output", str(tmp_path / "out"))
    time.sleep(seconds)
    assert interrupt(process) == (130, "afcache: interrupted\n")


def test_an_interrupt_while_drawing_is_one_line(tmp_path: Path):
    process = start("--num-images", "1000", "--prompt", "a two", "--output", str(tmp_path))
    deadline = time.monotonic() + 120
    while not (tmp_path / "a_two_seed1.png").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert interrupt(process) == (130, "afcache: interrupted\n")


def start(*options: str) -> subprocess.Popen[str]:
    """The command in a process of its own, drawing for long."""
    command = [sys.executable, "-m", "afcache", *GENERATE, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def interrupt(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Ctrl-C; the status, and what was said on stderr."""
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors
