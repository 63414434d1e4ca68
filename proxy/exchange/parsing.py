"""Bodies parsed without stopping the event loop: one that takes long is parsed in a process of its own.

A thread would not help: the JSON library holds the interpreter all the while. What such a body costs here is its way
to the other process and back, as bytes; its large values come back as JSON text, and are never looked into.
"""

import asyncio
import ctypes
import logging
import multiprocessing
import random
import resource
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from engines.openai.request import Asked, InvalidBodyError, asked, with_fragments, without_large_values

from ..errors import BodyTooLargeError
from .media import remote_media

logger = logging.getLogger("pd_proxy")

_QUICK_BYTES = 16 * 2**20
"""As text: about 20 ms of parsing."""
_QUICK_VALUES = 200_000
"""Lists, objects and their members: about as long."""
_NO_QUESTION_BYTES = 2**20
_SAMPLES = 64
_SAMPLE_BYTES = 1024
MOST_MEMORY_BYTES = 2 * 2**30
"""Of the other process: a body of empty objects grows 24 times when it is parsed."""
_TRIES = 2
_PR_SET_PDEATHSIG = 1


class Parser:
    """Reads bodies. The process for slow ones starts with the first of them, and reads one after the other."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    @staticmethod
    def is_quick(raw: bytes) -> bool:
        """Whether parsing these bytes takes a few ten milliseconds at most.

        Values are counted in samples, which are taken at random: to count them all takes longer than parsing text.
        """
        length = len(raw)
        if length <= _NO_QUESTION_BYTES:
            return True
        return length <= _QUICK_BYTES and _values_a_byte(raw) * length < _QUICK_VALUES

    async def parse(self, path: str, raw: bytes) -> Asked:
        """What `asked` says of these bytes; media that a node would fetch are refused, since nobody fetches them here.

        Raises InvalidBodyError, BodyTooLargeError.
        """
        for _ in range(_TRIES):
            try:
                found = await asyncio.get_running_loop().run_in_executor(self._running(), _parse, path, raw)
            except (MemoryError, SystemError):  # the JSON library runs out of memory in its own way
                break
            except BrokenProcessPool:  # ... or takes the process with it; perhaps it was another request's body
                continue
            return with_fragments(found)
        raise BodyTooLargeError("the request body has too many values in it")

    def _running(self) -> ProcessPoolExecutor:
        if self._pool is not None and not self._pool._broken:  # noqa: SLF001  it has no other word for it
            return self._pool
        if self._pool is not None:
            logger.warning("the process that parses large bodies died, and is started again")
            self._pool.shutdown(wait=False)
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_prepare)
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _prepare() -> None:
    """In the other process: it ends with ours, however that ends, and takes no more memory than it may."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))


def _values_a_byte(raw: bytes) -> float:
    values = 0
    for _ in range(_SAMPLES):
        start = int(random.random() * (len(raw) - _SAMPLE_BYTES))  # noqa: S311  nobody must foresee it, nobody must trust it
        sample = raw[start : start + _SAMPLE_BYTES]
        values += sample.count(b",") + sample.count(b"[") + sample.count(b"{")
    return values / (_SAMPLES * _SAMPLE_BYTES)


def _parse(path: str, raw: bytes) -> Asked:
    found = asked(path, raw)
    try:
        return without_large_values(_without_remote_media(found))
    except TypeError as exc:
        raise InvalidBodyError("the request body is nested too deeply") from exc


def _without_remote_media(found: Asked) -> Asked:
    if any(True for _ in remote_media(found.body, most_objects=None)):
        raise InvalidBodyError("a body as large as this may not name media to be fetched; send them as data: URLs")
    return found
