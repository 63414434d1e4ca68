"""An arm that runs for as long as something is measured on it, and what has to be known of it first."""

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx

from ..errors import ConfigError, LauncherError
from ..events.events import Events
from ..events.files import InLog
from ..hosts.host import Host
from ..hosts.reserve import Reserved
from ..inspect import logs
from ..inspect.runs import RunFolder
from ..plan.config import LaunchConfig
from ..plan.plan import Plan
from ..run import proof
from ..run.checked import reserve_checked
from ..run.supervisor import Supervisor
from .arms import Arm
from .workload import Workload

_FEWEST_TOKENS = 16
"""That differ: of fewer no prompts can be made that do not begin alike."""
_SAMPLE = (
    "The quick brown fox jumps over the lazy dog; 0123456789 times it asked how many prompts a prefill node computes, "
    "and why a decode node, which reads all of them in each step, would rather have fewer, longer or shorter ones."
)


async def started(  # noqa: PLR0913, PLR0917  what a run is made of
    arm: Arm,
    base: LaunchConfig,
    path: Path,
    host: Host,
    events: Events,
    work: Callable[[Supervisor], Coroutine[Any, Any, None]],
    planned: Callable[[Reserved], None] = lambda _: None,
) -> None:
    """`work` on a run in a folder of its own, which is down afterwards. `planned`: a look at what will be started.

    Raises LauncherError.
    """
    folder = RunFolder(path)
    folder.claim()
    try:
        folder.set_aside()
        config = arm.config(base, run_dir=path)
        reserved, _ = reserve_checked(config, host)
        try:
            planned(reserved)
            told = Events(events.tell, InLog(path / logs.OF_THE_LAUNCHER), live=events.live)
            await Supervisor(config, reserved, host, folder, told).run_through(work)
        finally:
            reserved.reservation.close()
    finally:
        folder.release()


async def refuse_what_is_too_long(client: httpx.AsyncClient, plan: Plan, workload: Workload) -> None:
    """... for the model, as its nodes say. Raises ConfigError."""
    cards = (await client.get(f"{plan.proxy_url}/v1/models", headers=proof.key(plan))).json()["data"]
    refuse_longer(workload, next((card["max_model_len"] for card in cards if card.get("max_model_len")), None))


def refuse_longer(workload: Workload, longest: int | None) -> None:
    """Raises ConfigError for a request that the model cannot take."""
    if longest is None or workload.longest <= longest:
        return
    number, worst = max(enumerate(workload.requests, 1), key=lambda one: one[1].tokens + one[1].output)
    raise ConfigError(
        f"{workload.name}: request {number} has {worst.tokens} + {worst.output} tokens, and the model takes {longest}",
        f"--scale {longest / workload.longest * 0.99:.2g} makes all of them shorter; --max-model-len may allow more",
    )


async def vocabulary_of(client: httpx.AsyncClient, plan: Plan) -> list[int]:
    """Token ids that every model has a use for: those of a text. Raises LauncherError."""
    node = plan.nodes[0]
    body = {"model": plan.served_model_name, "prompt": _SAMPLE}
    answer = await client.post(f"{node.url}/tokenize", json=body, headers=proof.node_key(plan))
    found = sorted(set(answer.json().get("tokens", []))) if answer.is_success else []
    if len(found) < _FEWEST_TOKENS:
        raise LauncherError(f"{node.name} has no tokens to make prompts of: {answer.text[:200]}")
    return found
