"""The whole fleet under Ray Serve: replicas and the ledger are killed in the middle, and every accepted image comes."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.serving.fleet.conftest import Client

pytestmark = [pytest.mark.dist, pytest.mark.xdist_group("fleet")]
STEPS = 150
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
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.client = Client(f"http://127.0.0.1:{port}")
        assert self.process.stdout is not None
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("serving at"):
                return
        raise AssertionError("".join(self.lines))

    def stop(self) -> str:
        """As Ctrl-C does; what it said."""
        self.process.send_signal(signal.SIGINT)
        said, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, said
        return said

    def members(self, kind: str) -> list[int]:
        """Processes of a deployment, of this fleet."""
        # Ray's workers leave the process that began them: they are known by the file that they keep.
        return [process.pid for process in psutil.process_iter() if f"ServeReplica:afcache:{kind}" in _title(process)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


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
    until = time.monotonic() + 60
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
    # Sums of calls of other sizes round otherwise.
    assert np.abs(images(fleet.client, names) - images(fleet.client, undisturbed)).max() <= 1
    until = time.monotonic() + 60
    while len(fleet.members("Drawer")) < 2:
        assert time.monotonic() < until, "Ray starts it again"
        time.sleep(0.1)


def test_the_ledger_dies_and_every_image_comes(fleet: Fleet):
    names = submit(fleet.client)
    until_drawing(fleet.client, names)
    (ledger,) = fleet.members("Ledger")
    os.kill(ledger, signal.SIGKILL)
    assert [fleet.client.wait(name)["state"] for name in names] == ["drawn"] * COUNT
    assert len({image.tobytes() for image in images(fleet.client, names)}) == COUNT


@pytest.mark.slow
def test_what_was_accepted_is_drawn_after_the_fleet_was_stopped(fleet: Fleet, folder: Path):
    names = submit(fleet.client)
    until_drawing(fleet.client, names)
    assert "what is not drawn goes on at the next start" in fleet.stop()
    assert fleet.members("Drawer") == []
    again = Fleet(folder, "--replicas", "1-2")
    try:
        seen = [again.client.wait(name) for name in names]
        assert [each["state"] for each in seen] == ["drawn"] * COUNT
        assert json.loads(again.client.ask("/status")[1])["requests"]["drawn"] == 4 * COUNT
    finally:
        again.stop()
