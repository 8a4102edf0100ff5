"""A replica's work: one `Batcher`, whose requests tell how far they are while they are drawn."""

import asyncio
import io
import time
from collections.abc import AsyncGenerator
from typing import Any

import torch

from afcache.serving.batcher import Batcher
from afcache.serving.fleet.asked import Asked, Drawn, Event, Failed, Progressed
from afcache.serving.handle import BusyError, EndedError, Handle, Served

# Seconds between two looks at a request.
_LOOK = 0.05


class Drawer:
    """Draws what is asked for, in one process, on one device.

    Args:
        pipe: on its device.
        name: of the replica.
        defaults: of the pipeline's call, where a request leaves something out.
        checkpoint_seconds: after which a request's checkpoint is told again: so much work is lost with the process at most.
        settings: of the `Batcher`.

    """

    def __init__(
        self, pipe: Any, *, name: str, defaults: dict[str, Any], checkpoint_seconds: float = 2.0, **settings: Any
    ) -> None:
        self._batcher = Batcher(pipe, **settings)
        self._name = name
        self._defaults = defaults
        self._checkpoint_seconds = checkpoint_seconds
        self._handles: dict[int, Handle] = {}
        self._drops = 0

    async def draw(self, asked: Asked, start: bytes | None = None) -> AsyncGenerator[Event, None]:
        """A request's way to its image; who stops listening gives it up.

        Args:
            asked: what is to be drawn.
            start: a checkpoint with which it goes on, or None.

        Raises:
            EndedError, MemoryError, torch.OutOfMemoryError: what is not the request's fault, as far as anybody knows.

        """
        handle = None
        try:
            handle = await self._submit(asked, start)
            self._handles[handle.number] = handle
            async for event in self._watch(handle):
                yield event
            served = handle.result(0)
            image = await asyncio.to_thread(_png, served)
            yield Drawn(image, served.pattern, self._name, self._batcher.metrics())
        except (EndedError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            yield Failed(f"{type(error).__name__}: {' '.join(str(error).split())}")
        finally:
            if handle is not None:
                self._handles.pop(handle.number, None)
                handle.cancel()

    def drop(self) -> None:
        """Give up whatever is drawn, or waits for room: those who asked for it are gone."""
        self._drops += 1
        for handle in list(self._handles.values()):
            handle.cancel()

    def check_health(self) -> None:
        """Raise where the replica should be started again.

        Raises:
            EndedError: its batcher draws nothing any more.

        """
        if not self._batcher.is_running():
            raise EndedError("the batcher has ended")

    def close(self) -> None:
        """Finish what is being drawn."""
        self._batcher.close()

    async def _submit(self, asked: Asked, start: bytes | None) -> Handle:
        """Wait for room without keeping others waiting."""
        generator = torch.Generator().manual_seed(asked.seed)
        arguments = {**asked.arguments(self._defaults), "generator": generator}
        drops = self._drops
        while drops == self._drops:
            try:
                return self._batcher.submit(tolerance=asked.budget(), start=start, wait=False, **arguments)
            except BusyError:
                await asyncio.sleep(_LOOK)
        raise EndedError("whoever asked for it is gone")

    async def _watch(self, handle: Handle) -> AsyncGenerator[Progressed, None]:
        """Tell what has changed, until it is done."""
        told, kept = None, time.monotonic()
        while not handle.done():
            await asyncio.sleep(_LOOK)
            progress = handle.progress()
            if progress == told or not progress.steps:
                continue
            data, now = None, time.monotonic()
            if now - kept >= self._checkpoint_seconds:
                data, kept = await asyncio.to_thread(handle.checkpoint), now
            told = progress
            yield Progressed(*progress, self._name, data)


def _png(served: Served) -> bytes:
    buffer = io.BytesIO()
    served.image.save(buffer, format="PNG")
    return buffer.getvalue()
