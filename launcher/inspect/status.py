"""How a run is: what its launcher wrote down, what the proxy says, what each node says of itself."""

import asyncio
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import httpx
import psutil
from pydantic import BaseModel, ConfigDict, Field

from engines.vllm import metrics

from ..errors import ConfigError
from .runs import ChildState, Death, Phase, RunFolder, RunState, left_behind, page_url, phase_of

_TIMEOUT_S = 3
"""A node that is hung is one of those that somebody looks for."""


class ChildStatus(BaseModel):
    """One child."""

    model_config = ConfigDict(frozen=True)

    name: str
    role: str
    state: str
    """As in `ChildState`; `left behind` when it lives and its launcher does not, `ended` when neither does."""
    pid: int | None
    age_s: float
    restarts: int
    url: str | None
    ports: tuple[str, ...]
    log: str
    deaths: tuple[Death, ...] = ()
    usable: bool | None = None
    """The proxy's word, and why not."""
    problem: str | None = None
    in_flight: int | None = None
    kv: str | None = None
    """Whether KV moves to it."""
    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None
    held: int | None = None
    """Hand-offs whose KV it keeps for a decode node."""
    tokens_a_second: float | None = None
    """Prompt tokens a prefill node computes, or tokens the others generate."""
    error: str | None = None
    """The last failure of a request there."""


class Pair(BaseModel):
    """Hand-offs between two nodes in the last minute."""

    model_config = ConfigDict(frozen=True)

    prefill: str
    decode: str
    a_second: float


class Status(BaseModel):
    """One run; `--json` is its dump."""

    model_config = ConfigDict(frozen=True)

    run_dir: str
    phase: Phase
    health: str
    """ok, degraded or unavailable; down when the proxy does not answer."""
    host: str
    proxy_url: str
    page: str = Field("", exclude=True)
    """Its address, key and all: for this user's screen only."""
    model: str
    engine: str
    connector: str
    proven: str | None
    launcher: int
    age_s: float
    children: tuple[ChildStatus, ...]
    proxy: dict[str, float | None] = {}
    """Its figures of the last minute, as the page shows them."""
    pairs: tuple[Pair, ...] = ()


def sessions_of(processes: Iterable[psutil.Process]) -> set[int]:
    found = set()
    for one in processes:
        with suppress(OSError):  # it has just ended
            found.add(os.getsid(one.pid))
    return found


async def of(run: RunFolder) -> Status:
    """Raises ConfigError when nothing is known of the run."""
    state = run.read()
    if state is None:
        raise ConfigError(f"nothing is known of a run in {run.path}")
    phase = phase_of(run, state)
    alive = phase in ("starting", "ready", "stopping")
    left = sessions_of(left_behind(state)) if phase == "killed" else set()
    async with httpx.AsyncClient(trust_env=False, timeout=_TIMEOUT_S) as client:
        health, view = await asyncio.gather(_health(client, state), _view(client, state)) if alive else ({}, {})
        asked = (_child(client, child, health, view, alive=alive, left=child.pid in left) for child in state.children)
        children = await asyncio.gather(*asked)
    return Status(
        run_dir=str(run.path), phase=phase, health=health.get("status", "down"), host=state.host,
        proxy_url=state.proxy_url, page=page_url(state.admin_url, state.admin_key), model=state.model,
        engine=state.engine, connector=state.connector, proven=state.proven, launcher=state.launcher,
        age_s=round(time.time() - state.began),  # noqa: TID251  of a record that another process wrote
        children=tuple(children), proxy=view.get("proxy", {}), pairs=tuple(view.get("pairs", ())),
    )  # fmt: skip


async def _health(client: httpx.AsyncClient, state: RunState) -> dict[str, Any]:
    with suppress(httpx.HTTPError, ValueError):
        answer: dict[str, Any] = (await client.get(f"{state.proxy_url}/health")).json()
        return answer
    return {}


async def _view(client: httpx.AsyncClient, state: RunState) -> dict[str, Any]:
    """What the page shows."""
    with suppress(httpx.HTTPError, ValueError):
        answer = await client.get(f"{state.admin_url}/state", headers=admin_headers(state))
        if answer.status_code == 200:
            found: dict[str, Any] = answer.json()
            return found
    return {}


def admin_headers(state: RunState) -> dict[str, str]:
    """For the proxy's admin listener."""
    return {"authorization": f"Bearer {state.admin_key}"}


async def _child(  # noqa: PLR0913  what is known of it, and from whom
    client: httpx.AsyncClient,
    child: ChildState,
    health: dict[str, Any],
    view: dict[str, Any],
    *,
    alive: bool,
    left: bool,
) -> ChildStatus:
    seen: dict[str, Any] = next((entry for entry in health.get("nodes", []) if entry["name"] == child.name), {})
    state = child.state if alive else "left behind" if left else "ended"
    found: dict[str, Any] = {
        "age_s": round(time.time() - child.since),  # noqa: TID251  of a record that another process wrote
        "state": state,
        "log": str(child.log),
    }
    found |= {key: seen.get(key) for key in ("usable", "problem", "in_flight", "kv")}
    told: dict[str, Any] = next((entry for entry in view.get("nodes", []) if entry["name"] == child.name), {})
    found |= {key: told.get(key) for key in ("held", "tokens_a_second")} | {"error": told.get("error") or None}
    if alive and child.url:
        with suppress(httpx.HTTPError, ValueError):
            gauges = metrics.gauges((await client.get(f"{child.url}/metrics")).text)
            found |= {"running": gauges.running, "waiting": gauges.waiting, "kv_usage": gauges.kv_usage}
    kept = {key: getattr(child, key) for key in ("name", "role", "pid", "restarts", "url", "ports", "deaths")}
    return ChildStatus(**(kept | found))
