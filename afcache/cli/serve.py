"""`afcache serve`: everything that can be wrong is found out, then a fleet is started, and serves until it is told to stop."""

import argparse
import errno
import functools
import importlib
import logging
import os
import signal
import socket
import sqlite3
import threading
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
    if defaults.get("true_cfg_scale", 1.0) > 1:
        defaults["negative_prompt"] = ""
    title = arguments.model or "mini-flux"
    _serve(
        Plan(
            load=functools.partial(_load, arguments.model, arguments, device),
            title=title,
            defaults=defaults,
            book=_book(arguments.folder),
            replicas=arguments.replicas,
            gpus=float(device.type == "cuda"),
            max_batch=arguments.max_batch,
            max_requests=arguments.max_requests or _REQUESTS_PER_BATCH * arguments.max_batch,
            checkpoint_seconds=arguments.checkpoint_seconds,
            drain_seconds=arguments.drain_seconds,
            settings={"preset": arguments.preset, "tolerance": arguments.tolerance, "compile": arguments.compile},
            example=example_of(title),
        ),
        arguments,
    )


def _check_address(host: str, port: int) -> None:
    """Raise where nobody can listen at an address: Ray would say so in a file.

    Raises:
        ValueError: it is taken, or none of this machine's.

    """
    try:
        with socket.socket() as place:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind((host, port))
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


def _book(folder: Path) -> Path:
    """The file of accepted requests, in a folder that is made now.

    Raises:
        ValueError: there cannot be such a folder, or the file is of something else.

    """
    path = folder.resolve() / _BOOK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        from afcache.serving.fleet.book import Book

        Book(path).close()
    except (OSError, sqlite3.Error) as error:
        raise ValueError(f"--folder {str(folder)!r} must be a folder or a place for one, to write to: {error}.") from error
    return path


def _load(name: str | None, arguments: argparse.Namespace, device: "torch.device") -> Any:
    """In a replica's process."""
    from afcache.cli.outline import outline

    return load_pipeline(outline(resolve_model(name)), arguments, device)


def _serve(plan: "Plan", arguments: argparse.Namespace) -> None:
    """Start the fleet, say where it is, wait for a signal, stop it."""
    # Ray's own: it would ask over the network how it is used.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with quiet_imports():
        import ray
        from ray import serve

        from afcache.serving.fleet.app import NAME, make_fleet

    stop = threading.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: stop.set())
    least, most = plan.replicas
    processors = max(most, os.cpu_count() or 1)
    print(f"starting {least} replica{'s' if least > 1 else ''} of {plan.title} ...", flush=True)
    # A cluster of somebody's own counts its processors itself, and stays when the fleet goes.
    is_joined = "RAY_ADDRESS" in os.environ
    options: dict[str, Any] = {} if is_joined else {"num_cpus": processors, "include_dashboard": False}
    ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **options)
    try:
        serve.start(http_options={"host": arguments.host, "port": arguments.port})
        serve.run(make_fleet(plan), name=NAME, route_prefix="/")
        print(
            f"serving at http://{arguments.host}:{arguments.port} (Ctrl-C stops; {plan.book} keeps what was accepted)",
            flush=True,
        )
        stop.wait()
        print("stopping: what is not drawn goes on at the next start", flush=True)
    finally:
        serve.delete(NAME) if is_joined else serve.shutdown()
        ray.shutdown()
