"""Who may ask: the proxy's own keys, checked on a request's head, before any route is looked at."""

import asyncio
import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

from ..nodes.topology import stamp_of

logger = logging.getLogger("pd_proxy.keys")

OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/ping", "/metrics"})
"""What a load balancer and a Prometheus ask, by exact path; everything else needs a key when there are keys."""

_LOOK_EVERY_S = 1.0


class KeysError(Exception):
    """The keys cannot be used; the message says why."""


class KeyRing:
    """The keys of all clients, each with a name for the log. Empty and without a file: everybody may ask.

    Only digests are kept and compared: how long a look-up takes tells nothing of a key.
    """

    def __init__(self, keys: Iterable[str], file: Path | None) -> None:
        """Raises KeysError when the file cannot be used."""
        self._fixed = {_digest(key.encode()): f"key-{number}" for number, key in enumerate(keys, start=1)}
        self._file = file
        self._stamp = stamp_of(file) if file is not None else None
        self._names = self._fixed | (_read(file) if file is not None else {})
        self.is_needed = bool(self._names)

    def name_of(self, authorization: bytes | None, api_key: bytes | None = None) -> str | None:
        """The name of the key in an Authorization header, or in Anthropic's own, `x-api-key`; None when neither is
        known. Some clients send both, with something else in one of them.
        """
        scheme, _, key = (authorization or b"").partition(b" ")
        name = self._names.get(_digest(key.strip())) if scheme.lower() == b"bearer" else None
        if name is None and api_key is not None:
            name = self._names.get(_digest(api_key.strip()))
        return name

    async def follow(self) -> None:
        """Take in every change of the file, for ever. One that cannot be used changes nothing."""
        while self._file is not None:
            await asyncio.sleep(_LOOK_EVERY_S)
            stamp = stamp_of(self._file)
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._names = self._fixed | _read(self._file)
                except KeysError as exc:
                    logger.warning("keys left as they were: %s", exc)
                else:
                    logger.info("keys now: %s", ", ".join(sorted(self._names.values())))


def _read(file: Path) -> dict[bytes, str]:
    """Digest and name of each key; one a line, as `[NAME] KEY`."""
    try:
        lines = [line.split("#", 1)[0].split() for line in file.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as exc:
        raise KeysError(f"cannot read the keys in {file}: {getattr(exc, 'strerror', None) or 'no text'}") from exc
    found = {}
    for number, words in enumerate(lines, start=1):
        if len(words) > 2:
            raise KeysError(f"{file}, line {number}: a line is `KEY` or `NAME KEY`")
        if words:
            found[_digest(words[-1].encode())] = words[0] if len(words) == 2 else f"line-{number}"
    if not found:
        raise KeysError(f"{file} has no key in it")
    return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
