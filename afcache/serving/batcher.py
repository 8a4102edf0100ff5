"""`Batcher`: one transformer for many requests, each as it would be drawn alone."""

import collections
import contextlib
import functools
import itertools
import threading
import time
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import Any

import torch

from afcache._checks import check_integer, check_number
from afcache.runtime.compiled import CompiledStep, CompileOptions
from afcache.serving.checkpoint import read_request
from afcache.serving.engine import Arrived, Engine
from afcache.serving.handle import BusyError, EndedError, Handle, Request, Served
from afcache.serving.intake import Departure, copied, depart, requests_of
from afcache.serving.metrics import Metrics, prometheus_text
from afcache.serving.settings import check_foreseeable, settings_of
from afcache.settings.config import CacheConfig
from afcache.settings.presets import resolve_config


class Batcher:
    """Draw requests that arrive at any time, several in one call of the transformer.

    batcher = afcache.Batcher(pipe)
    handle = batcher.submit(prompt="a cat", num_inference_steps=28, generator=torch.Generator().manual_seed(0))
    image = handle.result().image
    batcher.close()

    Every request has its own steps, guidance, tolerance and state, and its image is the one that it would have alone. A step is
    computed together with those of other requests that are due, and forecast where it is not due.

    Args:
        pipe: of a family whose requests can share calls, that draws by Euler's steps, on its device; neither it nor its
            transformer is changed.
        config, preset, tolerance: as of `afcache.compile_pipeline`; those that a request does not set.
        max_batch: samples of one computed call; 1 to 1024.
        max_requests: that are drawn or wait at the same time; those beyond it wait in `submit`, or are refused.
        compile: whether torch.compile makes a graph of each size of a call.
        backend: torch.compile's.

    Raises:
        ValueError, TypeError: settings that exclude each other, or numbers out of their range.
        NotImplementedError: a policy that decides within the step, or by groups, or a family whose requests are drawn one by
            one.

    """

    def __init__(
        self,
        pipe: Any,
        *,
        config: CacheConfig | None = None,
        preset: str | None = None,
        tolerance: float | None = None,
        max_batch: int = 8,
        max_requests: int = 64,
        compile: bool = False,
        backend: str = "inductor",
    ) -> None:
        check_integer("max_batch", max_batch, 1, 1024)
        check_integer("max_requests", max_requests, 1, None)
        settings = resolve_config(config, preset=preset, tolerance=tolerance)
        check_foreseeable(settings)
        options = CompileOptions(backend=backend, dynamic=False)
        compiled = functools.partial(CompiledStep, compiler=torch.compile, options=options) if compile else None
        self._pipe = pipe
        self._requests = requests_of(pipe)
        self._settings = settings
        self._max_batch = max_batch
        self._engine = Engine(pipe.transformer, config=settings, max_batch=max_batch, compiled=compiled)
        self._numbers = itertools.count()
        self._places = threading.Semaphore(max_requests)
        self._max_requests = max_requests
        self._metrics = Metrics()
        # Guards all below; the engine belongs to its own thread.
        self._changed = threading.Condition()
        self._known: dict[int, Request] = {}
        self._departures: dict[int, Departure] = {}
        self._ready: collections.deque[int] = collections.deque()
        self._dropped: list[int] = []
        self._is_closing = False
        self._intake = ThreadPoolExecutor(1, "afcache-intake")
        self._delivery = ThreadPoolExecutor(1, "afcache-delivery")
        self._thread = threading.Thread(target=self._run, name="afcache-batcher", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: Any = None,
        *,
        tolerance: float | None = None,
        priority: float = 0.0,
        wait: bool = True,
        start: bytes | None = None,
        **arguments: Any,
    ) -> Handle:
        """Hand over what `pipe(...)` would be called with, for one image.

        Args:
            prompt: of the pipeline; None where `arguments` has embeddings.
            tolerance: of this request, under error control; None takes the batcher's.
            priority: those of a higher one are computed first, but nobody waits for more than a bounded number of ticks.
            wait: until there is room; else it is refused where there is none.
            start: `Handle.checkpoint()` of the same request, with which it goes on.
            arguments: of the pipeline. Generators and tensors are copied: they may be used again at once.

        Raises:
            BusyError: no room, and `wait` is False.
            EndedError: the batcher was closed.
            TypeError, ValueError: a tolerance or priority out of its range, or a start that is no checkpoint. One that is of
                another request comes from `Handle.result()`.

        """
        check_number("priority", priority, -1e9, 1e9)
        config = settings_of(self._settings, tolerance)
        kept = None if start is None else read_request(start)
        given = {name: copied(value) for name, value in arguments.items()} | ({} if prompt is None else {"prompt": prompt})
        if not self._places.acquire(blocking=wait):
            raise BusyError(
                f"{self._max_requests} requests are on their way, which is max_requests. Submit again later, with wait=True, "
                "or make the Batcher with more."
            )
        number, future = next(self._numbers), Future()
        request = Request(number, given, config, -priority, kept, future, time.monotonic())
        with self._changed:
            if self._is_closing:
                self._places.release()
                raise EndedError("the batcher was closed: make another one.")
            self._metrics.submitted += 1
            self._known[request.number] = request
            self._intake.submit(self._take_in, request)
        # Whoever cancels the future itself, as asyncio does, gives the request up, too.
        future.add_done_callback(lambda done: self._cancel(number) if done.cancelled() else None)
        return Handle(
            number,
            future,
            progress=lambda: self._engine.progress(number),
            checkpoint=lambda: self._engine.checkpoint(number),
            cancel=lambda: self._cancel(number),
        )

    def metrics(self) -> dict[str, float]:
        """What it has done so far: requests, refreshes saved, how full calls were, latencies, memory of states."""
        with self._changed:
            running = len(self._engine)
            return self._metrics.to_dict(
                running=running,
                waiting=max(0, len(self._known) - running),
                state_bytes=self._engine.state_bytes,
                max_batch=self._max_batch,
            )

    def prometheus(self) -> str:
        """The same as Prometheus text; needs prometheus_client."""
        return prometheus_text(self.metrics())

    def is_running(self) -> bool:
        """Whether it draws: false after `close`, and where its thread has died."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Finish what was accepted, and take nothing more in."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._intake.shutdown()
        with self._changed:
            self._changed.notify_all()
        self._thread.join()
        self._delivery.shutdown()

    def __enter__(self) -> "Batcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cancel(self, number: int) -> bool:
        with self._changed:
            request = self._known.get(number)
            if request is None:
                return False
            self._dropped.append(number)
            self._forget(request)
            self._metrics.cancelled += 1
            request.future.cancel()
            self._changed.notify_all()
            return True

    def _forget(self, request: Request) -> None:
        del self._known[request.number]
        self._departures.pop(request.number, None)
        self._places.release()

    def _take_in(self, request: Request) -> None:
        """In the intake's thread: prompts and noise."""
        if request.number not in self._known:
            return
        try:
            departure = depart(self._pipe, request.arguments)
        except BaseException as error:  # Whatever a tokenizer raises: nobody waits for ever.
            self._fail(request, error)
            return
        with self._changed:
            if request.number in self._known:
                self._departures[request.number] = departure
                self._ready.append(request.number)
                self._changed.notify_all()

    def _fail(self, request: Request, error: BaseException) -> None:
        with self._changed:
            if request.number not in self._known:
                return
            self._forget(request)
            self._metrics.failed += 1
            self._changed.notify_all()
        with contextlib.suppress(InvalidStateError):
            request.future.set_exception(error)

    def _run(self) -> None:
        """The engine's thread: nobody waits for ever for a result, whatever happens here."""
        try:
            self._tick_until_closed()
        except BaseException as error:
            with self._changed:
                self._is_closing, left = True, list(self._known.values())
            for request in left:
                self._fail(request, EndedError(f"the batcher ended: {type(error).__name__}: {error}"))
            raise
        finally:
            self._engine.clear()

    def _tick_until_closed(self) -> None:
        """Ticks while there is something to do."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or len(self._engine) or (self._is_closing and not self._known))
                if self._is_closing and not self._known:
                    return
                coming = [(self._known[number], self._departures[number]) for number in self._ready if number in self._known]
                self._ready.clear()
                dropped, self._dropped = self._dropped, []
            for number in dropped:
                self._engine.drop(number)
            for request, departure in coming:
                self._admit(request, departure)
            arrived = self._engine.tick()
            # Before any image: who has theirs finds the calls that it took.
            self._count_calls()
            for each in arrived:
                self._arrive(each)

    def _count_calls(self) -> None:
        calls, self._engine.computed = self._engine.computed, []
        with self._changed:
            self._metrics.calls += len(calls)
            self._metrics.samples += sum(calls)

    def _admit(self, request: Request, departure: Departure) -> None:
        try:
            self._engine.admit(request.number, departure, request.config, request.rank, start=request.start)
        except Exception as error:
            self._fail(request, error)

    def _arrive(self, arrived: Arrived) -> None:
        with self._changed:
            request = self._known.get(arrived.number)
        if request is None:
            return
        if arrived.failure is not None:
            self._fail(request, arrived.failure)
            return
        self._delivery.submit(self._deliver, request, arrived)

    def _deliver(self, request: Request, arrived: Arrived) -> None:
        """In the delivery's thread: the image of the latents."""
        departure = self._departures.get(request.number)
        if departure is None or arrived.latents is None:
            # Cancelled in the meantime.
            return
        try:
            image = self._requests.deliver(self._pipe, departure.branches[0], arrived.latents, departure.output_type)
        except BaseException as error:
            self._fail(request, error)
            return
        seconds = time.monotonic() - request.started
        with self._changed:
            if request.number not in self._known:
                return
            self._forget(request)
            self._metrics.finish(arrived.pattern, seconds)
            self._changed.notify_all()
        with contextlib.suppress(InvalidStateError):
            request.future.set_result(Served(image, arrived.pattern, seconds))
