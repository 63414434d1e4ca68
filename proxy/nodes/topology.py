"""The topology file, followed: whoever starts nodes writes it whole, by rename."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from pydantic import ValidationError

from engines.topology import Topology

from .fleet import Fleet
from .node import Node

logger = logging.getLogger("pd_proxy.topology")
_LOOK_EVERY_S = 0.5

Stamp = tuple[int, int, int] | None
"""Of one writing of the file: a rename makes another."""


class TopologyError(Exception):
    """The file cannot be used; the message says why."""


def read(path: Path) -> tuple[Topology, Stamp]:
    """What the file says, and which writing of it this is. Raises TopologyError when it is missing or no topology."""
    stamp = stamp_of(path)  # before: what is written meanwhile is read once more
    try:
        return Topology.model_validate_json(path.read_bytes()), stamp
    except OSError as exc:
        raise TopologyError(f"cannot read the topology {path}: {exc.strerror}") from exc
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise TopologyError(f"{path} is not a topology: {where}: {first['msg']}") from exc


def write(path: Path, nodes: Topology) -> None:
    """Whole or not at all: a follower never reads half a file."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(nodes.model_dump_json(indent=1))
    unfinished.replace(path)


async def follow(path: Path, applied: Stamp, fleet: Fleet, probe_all: Callable[[list[Node]], Awaitable[None]]) -> None:
    """Apply every change of the file after the writing `applied`, for ever. One that cannot be used changes nothing.

    Nodes are probed before they come, so that they can serve when those they stand in for go.
    """
    seen = applied
    while True:
        stamp = stamp_of(path)
        if stamp != seen:
            seen = await _apply(path, stamp, fleet, probe_all)
        await asyncio.sleep(_LOOK_EVERY_S)


async def _apply(path: Path, stamp: Stamp, fleet: Fleet, probe_all: Callable[[list[Node]], Awaitable[None]]) -> Stamp:
    try:
        nodes, stamp = read(path)
        newcomers = fleet.newcomers(nodes)
        await probe_all(newcomers)
        fleet.replace(nodes, newcomers)
    except TopologyError as exc:
        logger.warning("topology left as it was: %s", exc)
    else:
        logger.info("topology now: %s", ", ".join(node.spec.name for node in fleet) or "no nodes")
    return stamp


def stamp_of(path: Path) -> Stamp:
    """None when there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
