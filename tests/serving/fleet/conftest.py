"""A fleet of one, in this process: a real batcher, ledger and HTTP server, without Ray."""

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from afcache.serving.fleet.asked import Asked, Seen
from afcache.serving.fleet.book import Book
from afcache.serving.fleet.drawer import Drawer
from afcache.serving.fleet.front import make_front
from afcache.serving.fleet.ledger import Answer, Ledger
from tests.support.mini_flux import fresh_mini_flux

DEFAULTS = {"height": 32, "width": 32, "max_sequence_length": 16, "true_cfg_scale": 2.0, "negative_prompt": ""}
DONE = ("drawn", "failed", "cancelled")


class Client:
    """Speaks HTTP."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, *, method: str = "GET", body: Any = None, **headers: str) -> tuple[int, bytes]:
        """Status and what came."""
        data = None if body is None else json.dumps(body).encode()
        return self.send(path, data, method=method, **headers)

    def send(self, path: str, data: bytes | None, *, method: str = "POST", **headers: str) -> tuple[int, bytes]:
        """The same, of what need not be JSON."""
        named = {name.replace("_", "-"): value for name, value in {"Content_Type": "application/json", **headers}.items()}
        request = urllib.request.Request(f"{self.url}{path}", data, named, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def submit(self, **asked: Any) -> dict[str, Any]:
        """A request that is accepted."""
        status, said = self.ask("/requests", method="POST", body=asked)
        assert status == 202, said
        return json.loads(said)

    def look(self, name: str) -> dict[str, Any]:
        """What is known of it."""
        return json.loads(self.ask(f"/requests/{name}")[1])

    def status(self) -> dict[str, dict[str, float]]:
        """Of the fleet."""
        return json.loads(self.ask("/status")[1])

    def wait(self, name: str, *, seconds: float = 300.0) -> dict[str, Any]:
        """Until it is done."""
        until = time.monotonic() + seconds
        while (seen := self.look(name)).get("state") not in DONE:
            assert time.monotonic() < until, seen
            time.sleep(0.05)
        return seen


class LocalDesk:
    """The ledger in this process; the server's loop is its own."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    async def accept(self, name: str, asked: Asked) -> Answer:
        return self.ledger.accept(name, asked)

    async def look(self, name: str) -> Seen | None:
        return self.ledger.look(name)

    async def image(self, name: str) -> bytes | None:
        return self.ledger.image(name)

    async def cancel(self, name: str) -> bool:
        return await self.ledger.cancel(name)

    async def status(self) -> dict[str, dict[str, float]]:
        return self.ledger.status()


@pytest.fixture(scope="package")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Of the fleet of one."""
    drawer = Drawer(fresh_mini_flux(), name="here", defaults=DEFAULTS, max_requests=16)
    book: Path = tmp_path_factory.mktemp("served") / "book"
    ledger = Ledger(Book(book), drawer.draw, max_accepted=16)
    app = make_front(LocalDesk(ledger), title="mini-flux", defaults=DEFAULTS, example="a handwritten seven on a flower")
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Client(f"http://127.0.0.1:{port}")
    server.should_exit = True
    thread.join()
    drawer.close()
