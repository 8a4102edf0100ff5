"""The fleet as HTTP: requests are accepted, looked at, fetched and given up; one page draws with all of that."""

import uuid
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Header, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse

from afcache.serving.fleet.asked import Asked, Seen
from afcache.serving.fleet.ledger import Answer
from afcache.serving.fleet.text import fleet_text

_PAGE = Path(__file__).with_name("page.html")
_PNG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}}}, 404: {"description": "unknown, or not drawn"}}
_NAME = r"^[A-Za-z0-9_-]{1,64}$"


class Desk(Protocol):
    """Where requests are accepted: the ledger, here or in another process."""

    async def accept(self, name: str, asked: Asked) -> Answer:
        """Take a request."""
        ...

    async def look(self, name: str) -> Seen | None:
        """What is known of it."""
        ...

    async def image(self, name: str) -> bytes | None:
        """Its PNG."""
        ...

    async def cancel(self, name: str) -> bool:
        """Give it up."""
        ...

    async def status(self) -> dict[str, dict[str, float]]:
        """Of the fleet."""
        ...


def make_front(desk: Desk, *, title: str = "AFCache", defaults: dict[str, Any] | None = None, example: str = "") -> FastAPI:
    """The application.

    Args:
        desk: where requests go.
        title: of the page: the model's name.
        defaults: of the pipeline's call, which the page shows.
        example: the prompt that the page begins with.

    """
    app = FastAPI(title=title)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return _PAGE.read_text()

    @app.get("/model")
    async def model() -> dict[str, Any]:
        """Which model draws, and what it does where a request leaves something out."""
        return {"title": title, "defaults": defaults or {}, "example": example}

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        """Without what was given, which need not be JSON."""
        del request
        return JSONResponse({"detail": [{key: each[key] for key in ("loc", "msg", "type")} for each in error.errors()]}, 422)

    @app.post("/requests", status_code=202, responses={409: {"description": "another key"}, 503: {"description": "no room"}})
    async def accept(
        asked: Asked, response: Response, idempotency_key: Annotated[str | None, Header(pattern=_NAME)] = None
    ) -> Seen:
        """Accept a request. It will be drawn, whatever becomes of the replicas. One key is accepted once."""
        name = idempotency_key or uuid.uuid4().hex
        answer = await desk.accept(name, asked)
        if answer == "full":
            raise HTTPException(503, "as many requests are on their way as are accepted; ask again later", {"Retry-After": "5"})
        if answer == "other":
            raise HTTPException(409, f"something else was accepted under the key {name}: take another one")
        response.headers["Location"] = f"/requests/{name}"
        return await _found(name)

    @app.get("/requests/{name}")
    async def look(name: str) -> Seen:
        """How far a request is."""
        return await _found(name)

    @app.get("/requests/{name}/image", response_class=Response, responses=_PNG)
    async def image(name: str) -> Response:
        """Its image."""
        data = await desk.image(name)
        if data is None:
            seen = await _found(name)
            raise HTTPException(404, f"request {name} has no image: it is {seen.state}")
        return Response(data, media_type="image/png")

    @app.delete("/requests/{name}")
    async def cancel(name: str) -> Seen:
        """Give a request up."""
        await _found(name)
        await desk.cancel(name)
        return await _found(name)

    @app.get("/status")
    async def status() -> dict[str, dict[str, float]]:
        """Requests by their state, and what replicas have done."""
        return await desk.status()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        """The same as Prometheus reads it."""
        return fleet_text(await desk.status())

    async def _found(name: str) -> Seen:
        seen = await desk.look(name)
        if seen is None:
            raise HTTPException(404, f"request {name} is not known, or not any more")
        return seen

    return app
