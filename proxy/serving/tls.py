"""The listener's certificate, followed while its files change: new connections get the new one."""

import asyncio
import logging
import ssl
from pathlib import Path

from ..nodes.topology import stamp_of

logger = logging.getLogger("pd_proxy.tls")

_LOOK_EVERY_S = 5.0
_contexts: list[ssl.SSLContext] = []
"""Of this process's listener; uvicorn makes it before the application runs."""


class CertificateError(Exception):
    """The certificate cannot be used; the message says why."""


def context(certificate: Path, key: Path) -> ssl.SSLContext:
    """For the listener. Raises CertificateError."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(made, certificate, key)
    _contexts.append(made)
    return made


async def follow(certificate: Path, key: Path) -> None:
    """Load the files again whenever they change, for ever. A pair that cannot be used changes nothing."""
    seen = stamp_of(certificate), stamp_of(key)
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        now = stamp_of(certificate), stamp_of(key)
        if now == seen:
            continue
        try:
            _load(
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), certificate, key
            )  # half a pair must not spoil the one in use
            for used in _contexts:
                _load(used, certificate, key)
        except CertificateError as exc:
            logger.warning("certificate left as it was: %s", exc)
        else:
            logger.info("certificate loaded again from %s", certificate)
        seen = now


def _load(into: ssl.SSLContext, certificate: Path, key: Path) -> None:
    try:
        into.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as exc:
        raise CertificateError(f"cannot use {certificate} with {key}: {exc}") from exc
