"""Bodies parsed without stopping the event loop: one that takes long is parsed in a process of its own.

A thread would not help: the JSON library holds the interpreter all the while. What such a body costs here is its way
to the other process and back, as bytes; its large values come back as JSON text, and are never looked into.
"""

import asyncio
import ctypes
import logging
import multiprocessing
import resource
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from engines.openai.request import Asked, InvalidBodyError, asked, with_fragments, without_large_values

from ..errors import BodyTooLargeError, ProxyError
from .media import remote_media

logger = logging.getLogger("pd_proxy")

_QUICK_BYTES = 16 * 2**20
_QUICK_VALUES = 200_000
"""Lists, objects and their members: about 20 ms of parsing, as long as 16 MiB of text."""
MOST_MEMORY_BYTES = 2 * 2**30
"""Of the other process: a body of empty objects grows 24 times when it is parsed."""
_PR_SET_PDEATHSIG = 1


class Parser:
    """Reads bodies. The process for slow ones starts with the first of them, and reads one after the other."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    @staticmethod
    def is_quick(raw: bytes) -> bool:
        """Whether parsing these bytes takes a few ten milliseconds at most."""
        if len(raw) > _QUICK_BYTES:
            return False
        return len(raw) < _QUICK_VALUES or raw.count(b",") + raw.count(b"[") + raw.count(b"{") < _QUICK_VALUES

    async def parse(self, path: str, raw: bytes, *, must_name_no_media: bool) -> Asked:
        """What `asked` says of these bytes. Raises InvalidBodyError, BodyTooLargeError, ProxyError.

        `must_name_no_media`: refuse media that a node would fetch; the other process fetches none.
        """
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, context, initializer=_prepare)
        pool = self._pool
        try:
            found = await asyncio.get_running_loop().run_in_executor(pool, _parse, path, raw, must_name_no_media)
        except (MemoryError, SystemError) as exc:  # the JSON library runs out of memory in its own way
            raise BodyTooLargeError("the request body has too many values in it") from exc
        except BrokenProcessPool as exc:
            logger.warning("the process that parses large bodies died; it starts again with the next one")
            if self._pool is pool:
                self._pool = None
            pool.shutdown(wait=False)
            raise ProxyError("the request body could not be parsed", "Try again") from exc
        return with_fragments(found)

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


def _parse(path: str, raw: bytes, must_name_no_media: bool) -> Asked:  # noqa: FBT001  called by position
    found = asked(path, raw)
    if must_name_no_media and any(True for _ in remote_media(found.body, most_objects=None)):
        raise InvalidBodyError("a body as large as this may not name media to be fetched; send them as data: URLs")
    return without_large_values(found)
