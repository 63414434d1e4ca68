"""One prefill and one decode node, started to be measured."""

from pathlib import Path

import httpx

from ..errors import LauncherError
from ..events.events import Events
from ..hosts.host import Host
from ..plan.config import LaunchConfig
from ..run.supervisor import Supervisor
from .arms import Arm
from .calibrate import Measured, calibrate
from .starting import refuse_what_is_too_long, started, vocabulary_of
from .workload import Workload

PAIR = Arm(prefill=1, decode=1)


async def measure(config: LaunchConfig, workload: Workload, folder: Path, host: Host, events: Events) -> Measured:
    """Raises LauncherError; all is down afterwards."""
    found = list[Measured]()

    async def look(running: Supervisor) -> None:
        await running.start()
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            await refuse_what_is_too_long(client, running.plan, workload)
            vocabulary = await vocabulary_of(client, running.plan)

        async def work() -> None:
            try:
                found.append(await calibrate(running.plan, config, workload, vocabulary, events))
            except httpx.HTTPError as exc:
                raise LauncherError(f"a node or the proxy could not be asked: {exc!r}") from exc

        async with events.shown():
            await running.while_all_live(work())

    await started(PAIR, config, folder / "pair", host, events, look)
    return found[0]
