"""Several processes that serve one port (`--workers N`): uvicorn starts them, and starts them again."""

import gc
import json
import logging
import os
import resource
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastapi import FastAPI

from ..nodes import topology
from ..nodes.topology import TopologyError
from ..settings import ProxySettings
from . import board, logs
from .app import make_app
from .keys import KeysError

logger = logging.getLogger("pd_proxy")

_FOLDER = "PD_PROXY_WORKER_FOLDER"
_SETTINGS = "settings.json"
_LAST_GOOD = "topology.json"
_FAILED_STARTS = "failed-starts"
_MOST_FAILED_STARTS = 5
"""Starts in a row, all workers together, after which the whole proxy ends."""
_SPARE_ROWS = 8
"""A new worker may come before the old one is quite gone, and SIGTTIN asks uvicorn for one more."""


def prepare(settings: ProxySettings) -> None:
    """What every serving process does once, at its start."""
    logs.configure(settings.log_format)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a stream has two or three sockets
    gc.freeze()  # what the imports made stays: not to be walked again and again
    gc.set_threshold(2_000, 20, 50)


@contextmanager
def told(settings: ProxySettings) -> Iterator[None]:
    """While this lasts, processes started by this one can `make` the application with these settings.

    They are in a file that only this user can read: an environment variable is too short for many keys.
    """
    file = board.make_file(settings.workers + _SPARE_ROWS)
    try:
        with tempfile.TemporaryDirectory(prefix="pd-proxy-workers-") as name:
            folder = Path(name)  # made with mode 0700
            (folder / _SETTINGS).write_text(json.dumps({"settings": settings.model_dump_json(), "board": str(file)}))
            if settings.topology_file is not None:
                topology.write(folder / _LAST_GOOD, topology.read(settings.topology_file)[0])
            os.environ[_FOLDER] = name
            os.environ["PYTHONHASHSEED"] = str(
                1 + secrets.randbelow(2**32 - 1)
            )  # their keys of prompts must be the same ones
            yield
    finally:
        file.unlink()


def make() -> FastAPI:
    """The application of one worker; called by uvicorn in a process of its own.

    A topology file that cannot be used just now keeps no worker from coming back: it starts with the last good one.
    """
    folder = Path(os.environ[_FOLDER])
    told_ = json.loads((folder / _SETTINGS).read_text())
    settings = ProxySettings.model_validate_json(told_["settings"])
    prepare(settings)
    try:
        app = _made(settings, folder, board.Board(Path(told_["board"])))
    except (OSError, KeysError, TopologyError, ValueError) as exc:
        _failed_to_start(folder, exc)
        raise
    (folder / _FAILED_STARTS).unlink(missing_ok=True)
    return app


def _made(settings: ProxySettings, folder: Path, rows: board.Board) -> FastAPI:
    if settings.topology_file is None:
        return make_app(settings, rows)
    last_good = folder / _LAST_GOOD
    try:
        nodes, stamp = topology.read(settings.topology_file)
        topology.write(last_good, nodes)
    except TopologyError as exc:
        logger.warning("starting with the last topology that could be used: %s", exc)
        nodes, stamp = topology.read(last_good)[0], topology.stamp_of(settings.topology_file)
    return make_app(settings, rows, (nodes, stamp))


def _failed_to_start(folder: Path, error: Exception) -> None:
    """Uvicorn would start workers again and again, and keep the port: clients would wait in its backlog for ever."""
    with (folder / _FAILED_STARTS).open("a+") as file:
        file.write("x")
        file.seek(0)
        failures = len(file.read())
    logger.error("a worker cannot start (%d in a row): %s", failures, error)
    if failures >= _MOST_FAILED_STARTS:
        logger.error("workers cannot start; the proxy ends")
        os.kill(os.getppid(), 15)
        sys.exit(1)
