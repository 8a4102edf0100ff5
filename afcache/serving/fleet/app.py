"""The fleet as an application of Ray Serve: an entrance, a ledger, and replicas that draw."""

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from afcache.serving.fleet.asked import Asked, Event, Seen
from afcache.serving.fleet.book import Book
from afcache.serving.fleet.drawer import Drawer
from afcache.serving.fleet.front import make_front
from afcache.serving.fleet.ledger import Answer, Ledger

NAME = "afcache"
LEDGER = "Ledger"
# Seconds for which a ledger that has died is waited for, and between two tries.
_PATIENCE = 60.0
_PAUSE = 0.2


class Plan(NamedTuple):
    """What a fleet is made of.

    Attributes:
        load: makes the pipeline, on its device, in a replica's process.
        title: the model's name.
        defaults: of the pipeline's call, where a request leaves something out.
        book: the file of accepted requests.
        replicas: at least and at most; Ray chooses between them by how many requests are on their way.
        gpus: of each replica.
        max_batch: samples of one computed call.
        max_requests: that a replica draws at once.
        checkpoint_seconds: so much of a request's work is lost with a replica at most.
        drain_seconds: that a replica has to finish what it draws when it is taken away; after that its requests go on
            elsewhere.
        settings: others of each replica's `Batcher`.
        example: the prompt that the page begins with.

    """

    load: Callable[[], Any]
    title: str
    defaults: dict[str, Any]
    book: Path
    replicas: tuple[int, int] = (1, 1)
    gpus: float = 0.0
    max_batch: int = 8
    max_requests: int = 32
    checkpoint_seconds: float = 2.0
    drain_seconds: float = 60.0
    settings: dict[str, Any] = {}  # noqa: RUF012
    example: str = ""


class RemoteDesk:
    """The ledger, from another process. It may die, and be started again: whatever it is asked may be asked twice."""

    async def accept(self, name: str, asked: Asked) -> Answer:
        """As of `Ledger.accept`."""
        return await self._ask("accept", name, asked)

    async def look(self, name: str) -> Seen | None:
        """As of `Ledger.look`."""
        return await self._ask("look", name)

    async def image(self, name: str) -> bytes | None:
        """As of `Ledger.image`."""
        return await self._ask("image", name)

    async def cancel(self, name: str) -> bool:
        """As of `Ledger.cancel`."""
        return await self._ask("cancel", name)

    async def status(self) -> dict[str, dict[str, float]]:
        """As of `Ledger.status`."""
        return await self._ask("status")

    async def _ask(self, what: str, *given: Any) -> Any:
        ledger = serve.get_deployment_handle(LEDGER, app_name=NAME)
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                return await ledger.ask.remote(what, *given)
            except (RayActorError, ReplicaUnavailableError):
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(_PAUSE)


class RayLedger:
    """One process, which Ray starts again when it dies: the book knows what was accepted.

    Args:
        drawers: of the replicas.
        plan: of the fleet.

    """

    def __init__(self, drawers: DeploymentHandle, plan: Plan) -> None:
        self._drawers = drawers
        self._plan = plan
        self._ledger = Ledger(Book(plan.book), self._draw)
        self._begun = asyncio.Lock()
        self._has_begun = False
        self._is_closed = False

    async def check_health(self) -> None:
        """Ray asks from time to time, and so begins what was accepted before this process."""
        await self._begin()

    async def ask(self, what: str, *given: Any) -> Any:
        """What `Ledger` does under a name."""
        await self._begin()
        found = getattr(self._ledger, what)(*given)
        return await found if inspect.isawaitable(found) else found

    async def close(self) -> None:
        """Stop listening to replicas, which give up what they draw; all of it stays in the book."""
        self._is_closed = True
        await self._ledger.close()

    async def _begin(self) -> None:
        """Once, within the loop, where tasks can begin; what replicas drew for a ledger that has died is given up."""
        async with self._begun:
            if not self._has_begun and not self._is_closed:
                await asyncio.to_thread(self._drawers.broadcast("drop").results)
                self._ledger.resume()
                self._has_begun = True

    async def _draw(self, asked: Asked, start: bytes | None) -> AsyncGenerator[Event, None]:
        """By the replica that has least to do, or, where shapes have graphs, one that has drawn such a shape and has room."""
        options: dict[str, Any] = {"stream": True}
        if self._plan.settings.get("compile"):
            options["multiplexed_model_id"] = asked.shape(self._plan.defaults)
        stream: Any = self._drawers.options(**options).draw.remote(asked, start)
        try:
            async for event in stream:
                yield event
        finally:
            # Without effect on one that is done.
            stream.cancel()


class RayDrawer:
    """A replica.

    Args:
        plan: of the fleet.

    """

    def __init__(self, plan: Plan) -> None:
        limits = {"max_batch": plan.max_batch, "max_requests": plan.max_requests}
        self._drawer = Drawer(
            plan.load(),
            name=serve.get_replica_context().replica_id.unique_id,
            defaults=plan.defaults,
            checkpoint_seconds=plan.checkpoint_seconds,
            **limits,
            **plan.settings,
        )

    def check_health(self) -> None:
        """As of `Drawer.check_health`: Ray starts a replica again that raises here."""
        self._drawer.check_health()

    def drop(self) -> None:
        """As of `Drawer.drop`."""
        self._drawer.drop()

    @serve.multiplexed(max_num_models_per_replica=16)
    async def shape(self, name: str) -> str:
        """Nothing is loaded: it tells Ray which shapes were drawn here."""
        return name

    async def draw(self, asked: Asked, start: bytes | None) -> AsyncGenerator[Event, None]:
        """As of `Drawer.draw`."""
        if shape := serve.get_multiplexed_model_id():
            await self.shape(shape)  # pyright: ignore[reportCallIssue]
        async for event in self._drawer.draw(asked, start):
            yield event


def make_fleet(plan: Plan) -> serve.Application:
    """The application, for `ray.serve.run(make_fleet(plan), name=NAME)`.

    Args:
        plan: what it is made of.

    """
    least, most = plan.replicas
    # A tick fills its call from those that are due, which are a few of all: so more of them are on their way than fit into it.
    # Ray takes as many again in, which wait within the replica: what a ledger that has died left there must not bar the way.
    scaling = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": max(1, plan.max_requests // 2)}
    count: dict[str, Any] = {"num_replicas": least} if least == most else {"autoscaling_config": scaling}
    drawers = serve.deployment(
        RayDrawer,
        name="Drawer",
        max_ongoing_requests=2 * plan.max_requests,
        graceful_shutdown_timeout_s=plan.drain_seconds,
        ray_actor_options={"num_cpus": 1, "num_gpus": plan.gpus},
        **count,
    ).bind(plan)
    light = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": 1000}
    ledger = serve.deployment(RayLedger, name=LEDGER, **light).bind(drawers, plan)

    def build() -> FastAPI:
        return make_front(RemoteDesk(), title=plan.title, defaults=plan.defaults, example=plan.example)

    front = serve.deployment(serve.ingress(build)(), name="Front", **light)
    return front.bind(ledger)
