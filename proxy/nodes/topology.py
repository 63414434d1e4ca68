"""The topology file, watched: whoever starts nodes writes it whole, by rename; the proxy follows."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from pydantic import ValidationError

from engines.topology import Topology

from .fleet import Node, Pool

logger = logging.getLogger("pd_proxy.topology")
_LOOK_EVERY_S = 0.5


class TopologyError(Exception):
    """The file cannot be used; the message says why."""


def read(path: Path) -> Topology:
    """Raises TopologyError when the file is missing or is no topology."""
    try:
        return Topology.model_validate_json(path.read_bytes())
    except OSError as exc:
        raise TopologyError(f"cannot read the topology {path}: {exc.strerror}") from exc
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise TopologyError(f"{path} is not a topology: {where}: {first['msg']}") from exc


async def follow(path: Path, pool: Pool, meet: Callable[[list[Node]], Awaitable[None]]) -> None:
    """Apply every change of the file to the pool, for ever. A file that cannot be used changes nothing.

    Nodes are met (probed) before they come, so that they can serve when those they stand in for go.
    """
    applied = _stamp(path)
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        stamp = _stamp(path)
        if stamp == applied:
            continue
        applied = stamp
        try:
            nodes = read(path)
            newcomers = pool.newcomers(nodes)
            await meet(newcomers)
            pool.replace(nodes, newcomers)
        except TopologyError as exc:
            logger.warning("topology left as it was: %s", exc)
        else:
            logger.info("topology now: %s", ", ".join(node.spec.name for node in pool) or "no nodes")


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino
