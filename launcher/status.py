"""How a run is: what its launcher wrote down, what the proxy says, what each node says of itself."""

import asyncio
import time
from contextlib import suppress
from typing import Any

import httpx

from engines.vllm import metrics

from .errors import ConfigError
from .runs import ChildState, RunFolder, RunState

_TIMEOUT_S = 5


async def of(run: RunFolder) -> dict[str, Any]:
    """All of it as data, for a screen or as JSON. Raises ConfigError when nothing is known of the run."""
    state = run.read()
    if state is None:
        raise ConfigError(f"nothing is known of a run in {run.path}")
    alive = run.is_alive
    async with httpx.AsyncClient(trust_env=False, timeout=_TIMEOUT_S) as client:
        health = await _health(client, state) if alive else {}
        children = await asyncio.gather(*(_child(client, child, health, alive=alive) for child in state.children))
    return {
        "run_dir": str(run.path),
        "phase": state.phase if alive else "stopped" if state.phase == "stopped" else "killed",
        "health": health.get("status", "down"),
        "proxy_url": state.proxy_url,
        "model": state.model,
        "engine": state.engine,
        "connector": state.connector,
        "proven": state.proven,
        "launcher": state.launcher,
        "age_s": round(time.time() - state.began),  # noqa: TID251  of a record that another process wrote
        "children": list(children),
    }


async def _health(client: httpx.AsyncClient, state: RunState) -> dict[str, Any]:
    with suppress(httpx.HTTPError, ValueError):
        answer: dict[str, Any] = (await client.get(f"{state.proxy_url}/health")).json()
        return answer
    return {}


async def _child(
    client: httpx.AsyncClient, child: ChildState, health: dict[str, Any], *, alive: bool
) -> dict[str, Any]:
    seen: dict[str, Any] = next((entry for entry in health.get("nodes", []) if entry["name"] == child.name), {})
    found: dict[str, Any] = {
        "name": child.name,
        "role": child.role,
        "state": child.state if alive else "ended",
        "pid": child.pid,
        "age_s": round(time.time() - child.since),  # noqa: TID251  of a record that another process wrote
        "restarts": child.restarts,
        "url": child.url,
        "ports": list(child.ports),
        "usable": seen.get("usable"),
        "problem": seen.get("problem"),
        "in_flight": seen.get("in_flight"),
        "kv": seen.get("kv"),
        "log": str(child.log),
    }
    if alive and child.url:
        with suppress(httpx.HTTPError, ValueError):
            gauges = metrics.gauges((await client.get(f"{child.url}/metrics")).text)
            found |= {"running": gauges.running, "waiting": gauges.waiting, "kv_usage": gauges.kv_usage}
    return found
