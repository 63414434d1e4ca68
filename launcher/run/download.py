"""The model, fetched once and before the clock of the nodes runs: else each of them would fetch all of it by itself."""

import asyncio
from pathlib import Path

from ..errors import PreflightError
from ..events.events import Events
from ..events.tail import last_line, tail
from ..hosts.host import Host
from ..plan.facts import HostFacts
from ..plan.plan import Plan, Process

_PROGRAM = "pd_model_download.py"
_NAME = "download"
_ENDS_WITHIN_S = 10


async def download(plan: Plan, facts: HostFacts, host: Host, run_id: str, events: Events) -> None:
    """Raises PreflightError: nothing was started then. What is in the cache is not fetched again."""
    if plan.download is None:
        return
    spec = _planned(plan, facts, plan.download.model, plan.download.revision)
    async with events.shown():
        with events.step(f"model {plan.download.model}", last_line(spec.log)):
            running = await host.start(spec, run_id, plan.run_dir)
            try:
                code = await running.ended()
            except asyncio.CancelledError:
                await running.stop(_ENDS_WITHIN_S)
                raise
            if code:
                reason = (tail(spec.log, 1) or ["it said nothing"])[0]
                hint = f"All of it is in {spec.log}. HF_HUB_OFFLINE=1 starts the nodes without asking the hub"
                raise PreflightError(f"the model could not be fetched: {reason}", hint)


def _planned(plan: Plan, facts: HostFacts, model: str, revision: str | None) -> Process:
    """A child as any other: it does not outlive a launcher that is killed, and `clean` knows it."""
    node = plan.nodes[0]
    return Process(
        name=_NAME,
        kind="service",
        command=(plan.engine_python, str(Path(facts.plugins) / _PROGRAM), model, *([revision] if revision else [])),
        environment=node.environment | {"TMPDIR": str(plan.run_dir)},
        inherited=node.inherited,
        ports=(),
        log=plan.run_dir / f"{_NAME}.log",
    )
