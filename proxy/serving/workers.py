"""One of several processes that serve one port (`--workers N`): uvicorn starts them, and starts them again."""

import gc
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..settings import ProxySettings
from . import board, logs
from .app import ProxyApp, make_app

_SETTINGS = "PD_PROXY_WORKER_SETTINGS"
_BOARD = "PD_PROXY_WORKER_BOARD"


def prepare(settings: ProxySettings) -> None:
    """What every serving process does once, at its start."""
    logs.configure(settings.log_format)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a stream has two or three sockets
    gc.freeze()  # what the imports made stays: not to be walked again and again
    gc.set_threshold(2_000, 20, 50)


@contextmanager
def told(settings: ProxySettings) -> Iterator[None]:
    """While this lasts, processes started by this one can `make` the application with these settings."""
    file = board.make_file(settings.workers + 1)  # one more: a new worker may come before the old one is quite gone
    os.environ |= {_SETTINGS: settings.model_dump_json(), _BOARD: str(file)}
    try:
        yield
    finally:
        file.unlink()


def make() -> ProxyApp:
    """The application of one worker; called by uvicorn in a process of its own."""
    settings = ProxySettings.model_validate_json(os.environ[_SETTINGS])
    prepare(settings)
    return make_app(settings, board.Board(Path(os.environ[_BOARD])))
