"""The whole fleet under Ray Serve: replicas and the ledger are killed in the middle, and every accepted image comes."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.serving.fleet.conftest import Client

pytestmark = [pytest.mark.dist, pytest.mark.alone]
STEPS = 100
_MARK = "AFCACHE_FLEET"
COUNT = 6


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Fleet:
    """The command, in a process of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        port = free_port()
        command = [sys.executable, "-m", "afcache", "serve", "--port", str(port), "--folder", str(folder), *options]
        # Ray's workers are nobody's children, but they inherit this.
        self.mark = uuid.uuid4().hex
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment[_MARK] = self.mark
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        self.client = Client(f"http://127.0.0.1:{port}")
        assert self.process.stdout is not None
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("serving at"):
                return
        raise AssertionError("".join(self.lines))

    def stop(self, how: signal.Signals = signal.SIGINT) -> str:
        """As Ctrl-C does; what it said."""
        self.process.send_signal(how)
        said, _ = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, said
        return said

    def members(self, kind: str) -> list[int]:
        """Processes of a deployment, of this fleet."""
        return [process.pid for process in psutil.process_iter() if self._is_one(process, f"ServeReplica:afcache:{kind}")]

    def _is_one(self, process: psutil.Process, title: str) -> bool:
        try:
            return title in " ".join(process.cmdline()) and process.environ().get(_MARK) == self.mark
        except psutil.Error:
            return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fleet")


@pytest.fixture(scope="module")
def fleet(folder: Path) -> Iterator[Fleet]:
    """Two replicas, each of which has room for half of the requests."""
    found = Fleet(folder, "--replicas", "2", "--max-requests", str(COUNT // 2), "--checkpoint-seconds", "0.2")
    yield found
    if found.process.poll() is None:
        found.stop()


def submit(client: Client, **changes: Any) -> list[str]:
    asked = {"prompt": "a handwritten seven on a flower", "steps": STEPS, "tolerance": 0.0}
    return [client.submit(**{**asked, "seed": seed, **changes})["id"] for seed in range(COUNT)]


def until_drawing(client: Client, names: list[str]) -> list[dict[str, Any]]:
    """Until all are on their way."""
    until = time.monotonic() + 300
    while not all((seen := client.look(name))["done"] > 10 for name in names):
        assert time.monotonic() < until, seen
        time.sleep(0.05)
    return [client.look(name) for name in names]


def images(client: Client, names: list[str]) -> np.ndarray:
    found = [client.ask(f"/requests/{name}/image") for name in names]
    assert [status for status, _ in found] == [200] * len(names)
    return np.stack([np.asarray(Image.open(io.BytesIO(data)), dtype=int) for _, data in found])


def test_a_replica_dies_and_every_image_comes(fleet: Fleet):
    undisturbed = submit(fleet.client)
    assert all(fleet.client.wait(name)["state"] == "drawn" for name in undisturbed)
    names = submit(fleet.client)
    before = until_drawing(fleet.client, names)
    assert len({seen["replica"] for seen in before}) == 2, "both have some of them"
    assert len(fleet.members("Drawer")) == 2
    os.kill(fleet.members("Drawer")[0], signal.SIGKILL)
    seen = [fleet.client.wait(name) for name in names]
    assert [each["state"] for each in seen] == ["drawn"] * COUNT
    assert sorted({each["moved"] for each in seen}) == [0, 1], "those of the other one were not disturbed"
    # A checkpoint is a fifth of a second old at most, and what was behind it was not done again.
    assert all(each["resumed"] > 0 for each in seen if each["moved"])
    # Sums of calls of other sizes round otherwise.
    assert np.abs(images(fleet.client, names) - images(fleet.client, undisturbed)).max() <= 1
    until = time.monotonic() + 300
    while len(fleet.members("Drawer")) < 2:
        assert time.monotonic() < until, "Ray starts it again"
        time.sleep(0.1)


def test_it_yields_to_others_no_more_than_the_command_does(fleet: Fleet):
    members = [pid for kind in ("Drawer", "Ledger", "Front") for pid in fleet.members(kind)]
    assert len(members) >= 4
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in members} == {os.getpriority(os.PRIO_PROCESS, fleet.process.pid)}


@pytest.mark.slow
def test_the_ledger_dies_and_every_image_comes(fleet: Fleet):
    # Longer than Ray takes to start it again.
    names = submit(fleet.client, steps=9 * STEPS)
    until_drawing(fleet.client, names)
    (ledger,) = fleet.members("Ledger")
    os.kill(ledger, signal.SIGKILL)
    assert [fleet.client.wait(name)["state"] for name in names] == ["drawn"] * COUNT
    assert len({image.tobytes() for image in images(fleet.client, names)}) == COUNT
    # What was drawn for the ledger that died was given up, and not drawn to its end for nobody.
    told = [metrics for name, metrics in fleet.client.status().items() if name != "requests"]
    assert sum(metrics["requests_cancelled"] for metrics in told) >= 1


def test_nobody_else_serves_from_its_folder(fleet: Fleet, folder: Path):
    command = [sys.executable, "-m", "afcache", "serve", "--port", str(free_port()), "--folder", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "is served from by another process" in ended.stderr


def test_it_stops_when_it_is_told_to(fleet: Fleet):
    """In the middle of its work, as whatever runs services asks for it."""
    submit(fleet.client)
    said = fleet.stop(signal.SIGTERM)
    assert "what is not drawn goes on at the next start" in said
    # So Ray says of those who draw on until they are killed.
    assert "failed to shut down" not in said
    assert fleet.members("Drawer") == []


@pytest.mark.slow
def test_what_was_accepted_is_drawn_after_the_fleet_was_stopped(tmp_path):
    fleet = Fleet(tmp_path, "--checkpoint-seconds", "0.2")
    names = submit(fleet.client)
    until_drawing(fleet.client, names)
    fleet.stop()
    again = Fleet(tmp_path, "--replicas", "1-2")
    try:
        assert [again.client.wait(name)["state"] for name in names] == ["drawn"] * COUNT
        assert again.client.status()["requests"]["drawn"] == COUNT
    finally:
        again.stop()
