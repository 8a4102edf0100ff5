"""`afcache serve`: everything that can be wrong is found out, then a fleet is started, and serves until it is told to stop."""

import argparse
import contextlib
import errno
import fcntl
import functools
import importlib
import logging
import os
import signal
import socket
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afcache.assets import recommended_settings
from afcache.cli.jobs import example_of
from afcache.cli.loading import load_pipeline
from afcache.cli.model import resolve_model
from afcache.cli.options import NAMES
from afcache.cli.silence import quiet_imports
from afcache.settings.presets import resolve_config

if TYPE_CHECKING:
    import torch

    from afcache.serving.fleet.app import Plan

_BOOK = "requests.sqlite"
_REQUESTS_PER_BATCH = 4
# Seconds to wait for the ledger to let go of its replicas.
_PATIENCE = 10.0


def run(arguments: argparse.Namespace) -> None:
    """Serve until Ctrl-C, or SIGTERM.

    Raises:
        ValueError, NotImplementedError, OSError: anything a user can mend; the message says how.

    """
    resolve_config(None, preset=arguments.preset, tolerance=arguments.tolerance)
    _check_installed()
    model = resolve_model(arguments.model)
    from afcache.cli.device import choose_device, missing_compiler

    device = choose_device(arguments.device)
    if arguments.compile and (problem := missing_compiler(device)):
        raise OSError(problem.replace("use --no-compile", "leave out --compile"))
    with quiet_imports():
        from afcache.cli.outline import outline
        from afcache.serving.fleet.app import Plan
        from afcache.serving.intake import requests_of

    found = outline(model)
    requests_of(found.pipe)
    _check_address(arguments.host, arguments.port)
    defaults = {
        name: value
        for option, value in recommended_settings(Path(model.name)).items()
        for name in NAMES.get(option, ())
        if name in found.call
    }
    _check_gpus(arguments.replicas[1], device)
    if defaults.get("true_cfg_scale", 1.0) > 1:
        defaults["negative_prompt"] = ""
    title = arguments.model or "mini-flux"
    # Held before the book is opened: who finds it taken must not have written into it.
    with _held(arguments.folder):
        plan = Plan(
            load=functools.partial(_load, arguments.model, arguments, device),
            title=title,
            defaults=defaults,
            book=_book(arguments.folder, title),
            replicas=arguments.replicas,
            gpus=float(device.type == "cuda"),
            max_batch=arguments.max_batch,
            max_requests=arguments.max_requests or _REQUESTS_PER_BATCH * arguments.max_batch,
            checkpoint_seconds=arguments.checkpoint_seconds,
            drain_seconds=arguments.drain_seconds,
            settings={"preset": arguments.preset, "tolerance": arguments.tolerance, "compile": arguments.compile},
            example=example_of(title),
        )
        _serve(plan, arguments)


def _check_gpus(replicas: int, device: "torch.device") -> None:
    """Raise where a replica would wait for a GPU for ever.

    Raises:
        ValueError: there are fewer GPUs than replicas.

    """
    import torch

    if device.type == "cuda" and replicas > torch.cuda.device_count():
        raise ValueError(f"--replicas {replicas} take a GPU each, and there are {torch.cuda.device_count()}: ask for fewer.")


def _check_address(host: str, port: int) -> None:
    """Raise where nobody can listen at an address: Ray would say so in a file.

    Raises:
        ValueError: it is taken, or none of this machine's.

    """
    try:
        family, kind, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"--port {port} is taken at {host}: choose another one.") from error
        raise ValueError(f"--host {host!r} and --port {port} cannot be listened at: {error.strerror or error}.") from error


def _check_installed() -> None:
    for name in ("ray", "fastapi", "prometheus_client"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise OSError(f"'afcache serve' needs {name}, which is not installed: pip install 'afcache[serve]'.") from error


def _book(folder: Path, title: str) -> Path:
    """The file of accepted requests.

    Raises:
        ValueError: the file cannot be written, or is of something else, or holds requests for another model.

    """
    path = folder.resolve() / _BOOK
    from afcache.serving.fleet.book import Book

    try:
        with contextlib.closing(Book(path)) as book:
            model = book.model(title)
    except sqlite3.Error as error:
        raise ValueError(f"--folder {str(folder)!r} must be a folder or a place for one, to write to: {error}.") from error
    if model != title:
        raise ValueError(
            f"--folder {str(folder)!r} keeps requests for --model {model} that are not drawn yet, got {title}. Serve that "
            "model, or take another folder."
        )
    return path


def _load(name: str | None, arguments: argparse.Namespace, device: "torch.device") -> Any:
    """In a replica's process."""
    from afcache.cli.outline import outline

    return load_pipeline(outline(resolve_model(name)), arguments, device)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Nobody else serves from a folder, which is made now: what was accepted would be drawn twice.

    Raises:
        ValueError: somebody does, or there cannot be such a folder.

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise ValueError(f"--folder {str(folder)!r} must be a folder or a place for one, to write to: {error}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"--folder {str(folder)!r} is served from by another process: take another one.") from error
        yield


def _serve(plan: "Plan", arguments: argparse.Namespace) -> None:
    """Start the fleet, say where it is, wait for a signal, stop it."""
    # Ray's own: it would ask over the network how it is used.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Added to this process's own. Ray's default, 15, leaves replicas a thirtieth of a processor that others want, too: it keeps
    # many workers from starving Ray's own processes, which few replicas do not.
    os.environ.setdefault("RAY_worker_niceness", "0")
    with quiet_imports():
        import ray
        from ray import serve

        from afcache.serving.fleet.app import NAME, make_fleet

    least, most = plan.replicas
    print(f"starting {least} replica{'s' if least > 1 else ''} of {plan.title} ...", flush=True)
    quietly: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
    ray.init("local", num_cpus=max(most, os.cpu_count() or 1), logging_level=logging.ERROR, **quietly)
    # Ray has handlers of its own.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.default_int_handler)
    try:
        serve.start(http_options={"host": arguments.host, "port": arguments.port})
        serve.run(make_fleet(plan), name=NAME, route_prefix="/")
        where = f"http://{arguments.host}:{arguments.port}"
        print(f"serving at {where} (Ctrl-C stops; {plan.book} keeps what was accepted)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        print("stopping: what is not drawn goes on at the next start", flush=True)
        _close_ledger()
    finally:
        serve.shutdown()
        ray.shutdown()


def _close_ledger() -> None:
    """So that no replica draws on for nobody."""
    from ray import serve

    from afcache.serving.fleet.app import LEDGER, NAME

    try:
        serve.get_deployment_handle(LEDGER, app_name=NAME).close.remote().result(timeout_s=_PATIENCE)
    except Exception as error:
        logging.getLogger(__name__).warning("the ledger was not closed in peace: %s", error)
